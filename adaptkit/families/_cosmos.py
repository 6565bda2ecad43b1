"""Rows of Cosmos-Predict 2 and of Anima, which has its transformer.

Source: diffusers' `convert_cosmos_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._plain import matrices, parameters
from adaptkit.families.contract import NATIVE_PREFIXES, Kind, Row, named, pair, row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ATTENTIONS", "PREFIXES", "cosmos_rows", "transformer_rows"]

PREFIXES = ("net.", *NATIVE_PREFIXES)
ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
PROJECTIONS = (
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
)
BUFFERS = ("seq", "dim_spatial_range", "dim_temporal_range")  # constants in some files


def _blocks(blocks: int) -> Iterator[Row]:
    here, there = f"blocks.{{i:{blocks}}}.", f"transformer_blocks.{{i:{blocks}}}."
    for ours, theirs in ATTENTIONS:
        for native, diffusers in PROJECTIONS:
            yield pair(f"{here}{ours}.{native}", f"{there}{theirs}.{diffusers}")
        for letter in "qk":
            yield pair(
                f"{here}{ours}.{letter}_norm", f"{there}{theirs}.norm_{letter}", kind=Kind.NORM
            )
    yield pair(f"{here}mlp.layer1", f"{there}ff.net.0.proj")
    yield pair(f"{here}mlp.layer2", f"{there}ff.net.2")
    for part, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")):
        for n in (1, 2):
            yield pair(f"{here}adaln_modulation_{part}.{n}", f"{there}{norm}.linear_{n}")


def transformer_rows(blocks: int) -> tuple[Row, ...]:
    """All rows of a transformer with this many blocks."""
    return (
        pair("x_embedder.proj.1", "patch_embed.proj"),
        pair("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
        pair("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
        pair("t_embedding_norm", "time_embed.norm", kind=Kind.NORM),
        *(
            row(
                f"pos_embedder.{n}",
                native=named(f"pos_embedder.{n}", weight=f"pos_embedder.{n}"),
                kind=Kind.NORM,
            )
            for n in BUFFERS
        ),
        *_blocks(blocks),
        pair("final_layer.linear", "proj_out"),
        pair("final_layer.adaln_modulation.1", "norm_out.linear_1"),
        pair("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    )


def cosmos_rows(blocks: int) -> tuple[Row, ...]:
    """All rows of Cosmos, with what 2.5, Transfer and Cosmos 1 have beside the blocks."""
    return (
        *transformer_rows(blocks),
        *matrices("crossattn_proj.0", "img_context_proj.0"),
        *parameters("learnable_pos_embed.pos_emb_(t|h|w)"),
    )
