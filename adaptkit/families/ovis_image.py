"""Ovis-Image: 7 G parameters, 6 double and 27 single blocks like FLUX.1's, with gated MLPs.

Its text comes from Ovis 2.5, without pooling. Source: AIDC-AI `ovis_image` and diffusers'
`OvisImageTransformer2DModel`, mapped as in diffusers' `convert_ovis_image_to_diffusers`; ComfyUI
loads it into its FLUX.1, whose names for the text it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._flux import SIZES, double_attention, embedder, single_block
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    pair,
    row,
    scaled,
    sizes,
    split,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DOUBLE, SINGLE = "double_blocks.{i:6}.", "single_blocks.{i:27}."
THEIRS, ALONE = "transformer_blocks.{i:6}.", "single_transformer_blocks.{i:27}."
SHARES = (1, 1, 1, 8)  # q, k, v, and value and gate of the MLP


def _mlps() -> Iterator[Row]:
    """The MLPs of a double block, whose value and gate diffusers stacks."""
    for ours, theirs in ((f"{DOUBLE}img_mlp.", "ff"), (f"{DOUBLE}txt_mlp.", "ff_context")):
        both = f"{THEIRS}{theirs}.net.0.proj"
        yield row(both, native=split(ours, "up_proj", "gate_proj"), diffusers=both)
        yield pair(f"{ours}down_proj", f"{THEIRS}{theirs}.net.2")


def _in_comfyui(original: Row) -> Row:
    """A row with ComfyUI's name, which is the original's where nothing else is said."""
    names = dict(original.names)
    return original._replace(names={"comfy": names.pop("scaled", names["native"]), **names})


ORIGINAL = (
    pair("img_in", "x_embedder"),
    pair("semantic_txt_in", "context_embedder", comfy="txt_in"),
    pair("semantic_txt_norm", "context_embedder_norm", comfy=scaled("txt_norm"), kind=Kind.NORM),
    *embedder("time_in", "timestep_embedder"),
    *double_attention(DOUBLE, THEIRS, plain=True),
    pair(f"{DOUBLE}img_mod.lin", f"{THEIRS}norm1.linear"),
    pair(f"{DOUBLE}txt_mod.lin", f"{THEIRS}norm1_context.linear"),
    *_mlps(),
    *single_block(SINGLE, ALONE, shares=SHARES, plain=True),
    pair(f"{SINGLE}modulation.lin", f"{ALONE}norm.linear"),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)
ROWS = tuple(map(_in_comfyui, ORIGINAL))

FAMILY = ModelFamily(
    name="ovis-image",
    title="Ovis-Image",
    components=(
        transformer(
            "Ovis-Image transformer",
            ROWS,
            sizes=sizes(f"{SIZES} 8dxd 11dxd dx2048", 3072),
            comfy="comfy",
            kohya="comfy",
        ),
    ),
    beside=(autoencoder("vae.", "first_stage_model."),),
    marks=(
        Mark("transformer", "img_attn.qkv", columns=3072),
        Mark("transformer", "ff.net.0.proj", rows=24576),
        Mark("transformer", "linear1", rows=33792),
    ),
    architectures=("ovis-image", "ovis_image"),
    modelspec="ovis-image",
    yields_to=("flux",),
)
