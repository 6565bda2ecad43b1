"""Stable Cascade, stage C (the prior): 3.6 G or 1 G parameters, 2048 or 1536 wide; OpenCLIP-G.

Adapters are of stage C; stage B, the decoder, has a table of its own shape and none. The original
fuses q, k and v; trainers and ComfyUI split them and keep its other names. Source: Stability AI
`StableCascade`, diffusers' `StableCascadeUNet`, mapped as in diffusers'
`convert_stable_cascade_unet_single_file_to_diffusers`; OneTrainer and ComfyUI for the prefixes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._clip import clip_g
from adaptkit.families._plain import matrices
from adaptkit.families.contract import (
    Component,
    Kind,
    Mark,
    ModelFamily,
    Row,
    named,
    row,
    sizes,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# convolutions, conditions and attention come in turns, all numbered together
BLOCKS = ("down_blocks.{i:2}.{j:72}.", "up_blocks.{i:2}.{j:72}.")


def _block(block: str) -> Iterator[Row]:
    # each channel by itself, of which a low-rank product is no change
    yield row(f"{block}depthwise", kind=Kind.EMBEDDING, kernel=(3, 3))
    yield from matrices(f"{block}channelwise.(0|4)", f"{block}mapper(|_sca|_crp)")
    scale = f"{block}channelwise.2"
    name = named(scale, weight=f"{scale}.gamma", bias=f"{scale}.beta")
    yield row(scale, diffusers=name, kind=Kind.NORM)
    ours, theirs = f"{block}attention.attn.", f"{block}attention."
    fused = named(f"{ours}in_proj", weight=f"{ours}in_proj_weight", bias=f"{ours}in_proj_bias")
    apart = split(f"{ours}to_", *"qkv")
    yield row(
        fused.module,
        native=fused,
        comfy=apart,
        diffusers=split(f"{theirs}to_", *"qkv"),
    )
    out = f"{ours}out_proj"
    yield row(out, native=out, comfy=out, diffusers=f"{theirs}to_out.0")
    yield from matrices(f"{block}kv_mapper.1")


ROWS = (
    *matrices("clip_(txt|txt_pooled|img)_mapper"),
    *matrices("embedding.1", "clf.1", kernel=(1, 1)),
    *matrices("down_downscalers.1.1.blocks.0", "up_upscalers.0.1.blocks.1", kernel=(1, 1)),
    *(made for block in BLOCKS for made in _block(block)),
)

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

FAMILY = ModelFamily(
    name="stable-cascade",
    title="Stable Cascade",
    components=(
        Component(
            name="prior",
            title="stage C",
            rows=ROWS,
            checkpoints={"native": PREFIXES, "comfy": PREFIXES, "diffusers": ("prior.", "")},
            tags={
                "kohya": ("prior_unet", "unet"),
                "comfy": ("diffusion_model",),
                "root": ("",),
                "diffusers": ("prior",),
            },
            namings={"kohya": "comfy", "comfy": "comfy"},
            sizes=sizes("dxd 2dxd 3dxd 4dxd dx2d dx4d 4dx2d 4dx1280 4dx768 dx1280", 2048, 1536),
        ),
        clip_g(name="text_encoder", kohya=("prior_te",)),
    ),
    marks=(
        Mark("prior", "attention.attn.in_proj", columns=(1536, 2048)),
        Mark("prior", "channelwise.4", rows=(1536, 2048)),
        Mark("text_encoder", "mlp.fc1", columns=1280),
    ),
    architectures=("stable-cascade", "stable_cascade"),
    modelspec="stable-cascade-v1-prior",
)
