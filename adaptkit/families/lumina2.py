"""Lumina Image 2.0: 2.6 G parameters, 26 layers and two refiners of two; Gemma2-2B.

Source: Alpha-VLLM `Lumina2` and diffusers' `Lumina2Transformer2DModel`, mapped as in diffusers'
`convert_lumina2_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._llm import gemma2_2b
from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    pair,
    row,
    sizes,
    split,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = ("layers.{i:26}.", "noise_refiner.{i:2}.", "context_refiner.{i:2}.")
SHARES = (3, 1, 1)  # 24 query heads, 8 of keys and of values


def _layer(layer: str) -> Iterator[Row]:
    """A layer; both namings share its stem, and the context refiner has no modulation."""
    modulated = not layer.startswith("context")
    ours, theirs = f"{layer}attention.", f"{layer}attn."
    yield pair(f"{ours}qkv", split(theirs, "to_q", "to_k", "to_v", ratio=SHARES))
    yield pair(f"{ours}out", f"{theirs}to_out.0")
    for letter in "qk":
        yield pair(f"{ours}{letter}_norm", f"{theirs}norm_{letter}", kind=Kind.NORM)
    for n in (1, 2, 3):
        yield pair(f"{layer}feed_forward.w{n}", f"{layer}feed_forward.linear_{n}")
    yield pair(
        f"{layer}attention_norm1",
        f"{layer}norm1.norm" if modulated else f"{layer}norm1",
        kind=Kind.NORM,
    )
    yield pair(f"{layer}attention_norm2", f"{layer}norm2", kind=Kind.NORM)
    for n in (1, 2):
        yield pair(f"{layer}ffn_norm{n}", f"{layer}ffn_norm{n}", kind=Kind.NORM)
    if modulated:
        yield pair(f"{layer}adaLN_modulation.1", f"{layer}norm1.linear")


ROWS = (
    pair("x_embedder", "x_embedder"),
    pair("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    pair("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    pair("cap_embedder.0", "time_caption_embed.caption_embedder.0", kind=Kind.NORM),
    pair("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    *(made for part in PARTS for made in _layer(part)),
    row("norm_final", kind=Kind.NORM),  # in the original checkpoint, but unused
    pair("final_layer.linear", "norm_out.linear_2"),
    pair("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
)

# 3840 rows: 24 heads of queries, 8 of keys and of values
SIZES = sizes("dxd 3840xd 4dxd dx4d 1024x1024 dx1024 4dx1024", 2304)

FAMILY = ModelFamily(
    name="lumina2",
    title="Lumina Image 2.0",
    components=(transformer("Lumina 2 transformer", ROWS, sizes=SIZES), gemma2_2b()),
    marks=(
        Mark("transformer", "attention.qkv", columns=2304),
        Mark("transformer", "feed_forward.w1", columns=2304),
        Mark("transformer", "feed_forward.w2", rows=2304),
        Mark("text_encoder", "self_attn.q_proj", columns=2304),
    ),
    architectures=("lumina-2", "lumina2", "lumina_2"),
    modelspec="lumina-2",
    base_version="lumina2",
)
