"""Z-Image (Turbo, Base, Edit): 6 G parameters, 30 layers and two refiners of two; Qwen3-4B.

Omni has a third refiner, of what SigLIP sees.

musubi-tuner writes diffusers' split projections, ComfyUI the fused ones of the checkpoint. Source:
Tongyi-MAI `z_image`, mapped as in ComfyUI's and diffusers' converters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._llm import qwen3
from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    named,
    pair,
    row,
    sizes,
    split,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = (
    "layers.{i:30}.",
    "noise_refiner.{i:2}.",
    "context_refiner.{i:2}.",
    "siglip_refiner.{i:2}.",
)
PLAIN = ("context", "siglip")  # refiners without modulation by time


def _same(module: str, kind: Kind = Kind.MATRIX) -> Row:
    return pair(module, module, kind=kind)


def _layer(layer: str) -> Iterator[Row]:
    """A layer; both namings share its stem."""
    ours = f"{layer}attention."
    yield pair(f"{ours}qkv", split(ours, "to_q", "to_k", "to_v"))
    yield pair(f"{ours}out", f"{ours}to_out.0")
    for letter in "qk":
        yield pair(f"{ours}{letter}_norm", f"{ours}norm_{letter}", kind=Kind.NORM)
    for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        yield _same(layer + name)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield _same(layer + name, Kind.NORM)
    if not layer.startswith(PLAIN):
        yield _same(f"{layer}adaLN_modulation.0")


ROWS = (
    pair("x_embedder", "all_x_embedder.2-1"),  # by patch size: 2 in space, 1 in time
    *(
        made
        for n in ("cap", "siglip")
        for made in (_same(f"{n}_embedder.0", Kind.NORM), _same(f"{n}_embedder.1"))
    ),
    _same("t_embedder.mlp.0"),
    _same("t_embedder.mlp.2"),
    *(
        row(
            name,
            native=named(name, weight=name),
            diffusers=named(name, weight=name),
            kind=Kind.NORM,
        )
        for name in ("x_pad_token", "cap_pad_token", "siglip_pad_token")
    ),
    *(made for part in PARTS for made in _layer(part)),
    pair("final_layer.linear", "all_final_layer.2-1.linear"),
    pair("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)

SIZES = sizes("dxd 3dxd 4dxd 10240xd dx10240 dx2560 dx1152", 3840)

FAMILY = ModelFamily(
    name="z-image",
    title="Z-Image",
    kin=("siglip_",),
    components=(
        transformer("Z-Image transformer", ROWS, sizes=SIZES, kohya="diffusers"),
        qwen3("4B", 36, comfy="qwen3_4b", kohya=()),
    ),
    marks=(
        Mark("transformer", "attention.qkv", columns=3840),
        Mark("transformer", "feed_forward.w1", columns=3840),
        Mark("transformer", "feed_forward.w2", rows=3840),
        Mark("text_encoder", "self_attn.q_proj", columns=2560),
    ),
    architectures=("z-image", "z_image", "zimage"),
    modelspec="Z-Image",
)
