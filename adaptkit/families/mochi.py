"""Mochi 1: video, 10 G parameters, 48 blocks, 3072 wide for video and 1536 for text; T5-XXL.

The last block has no MLP for the text. Source: diffusers'
`convert_mochi_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._plain import parameters
from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    pair,
    sizes,
    split,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SIDES = (
    ("x", 48, ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}", "ff"),
    (
        "y",
        47,
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_{}",
        "ff_context",
    ),
)


def _blocks() -> Iterator[Row]:
    every, theirs = "blocks.{i:48}.", "transformer_blocks.{i:48}."
    yield pair(f"{every}mod_x", f"{theirs}norm1.linear")
    yield pair("blocks.{i:47}.mod_y", "transformer_blocks.{i:47}.norm1_context.linear")
    yield pair("blocks.47.mod_y", "transformer_blocks.47.norm1_context.linear_1")
    for side, blocks, projections, out, norm, mlp in SIDES:
        yield pair(f"{every}attn.qkv_{side}", split(f"{theirs}attn1.", *projections))
        for letter in "qk":
            yield pair(
                f"{every}attn.{letter}_norm_{side}",
                f"{theirs}attn1.{norm.format(letter)}",
                kind=Kind.NORM,
            )
        ours, before = f"blocks.{{i:{blocks}}}.", f"transformer_blocks.{{i:{blocks}}}."
        yield pair(f"{ours}attn.proj_{side}", f"{before}attn1.{out}")
        yield pair(f"{ours}mlp_{side}.w1", swapped(f"{before}{mlp}.net.0.proj"))
        yield pair(f"{ours}mlp_{side}.w2", f"{before}{mlp}.net.2")


ROWS = (
    pair("x_embedder.proj", "patch_embed.proj", kernel=(2, 2)),
    pair("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    pair("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *(pair(f"t5_y_embedder.to_{n}", f"time_embed.pooler.to_{n}") for n in ("kv", "q", "out")),
    pair("t5_yproj", "time_embed.caption_proj"),
    *_blocks(),
    pair("final_layer.mod", swapped("norm_out.linear")),
    pair("final_layer.linear", "proj_out"),
    *parameters("pos_frequencies"),
)

SIZES = sizes("dxd 2dxd 3dxd 4dxd dx4096 16384xd dx8192", 3072) | sizes(
    "1536x4096 8192x4096 4096x4096 9216x1536 1536x3072 8192x1536"
)

FAMILY = ModelFamily(
    name="mochi",
    title="Mochi 1",
    components=(transformer("Mochi transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn.qkv_x", columns=3072),
        Mark("transformer", "attn.qkv_y", columns=1536),
        Mark("transformer", "mlp_x.w1", rows=16384),
    ),
    architectures=("mochi",),
    modelspec="mochi-1",
)
