"""MiniMax-H3: video with sound, 33 G parameters, 50 blocks of width 5376 with 56 heads of 128.

The pipeline has a second transformer of the same shape for references. The single files stack q, k
and v; the gate comes before the value in `fc1`, after it in diffusers. Source: diffusers'
`convert_minimax_h3_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import (
    Component,
    Kind,
    Mark,
    ModelFamily,
    Row,
    pair,
    row,
    sizes,
    split,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def _block(ours: str, theirs: str) -> Iterator[Row]:
    yield pair(f"{ours}attn.qkv_proj", split(f"{theirs}attn.", "to_q", "to_k", "to_v"))
    yield pair(f"{ours}attn.out_proj", f"{theirs}attn.to_out.0")
    yield pair(f"{ours}mlp.fc1", swapped(f"{theirs}ff.net.0.proj"))
    yield pair(f"{ours}mlp.fc2", f"{theirs}ff.net.2")
    for letter in "qk":
        yield pair(f"{ours}attn.{letter}_norm", f"{theirs}attn.norm_{letter}", kind=Kind.NORM)
    for n in (1, 2):
        yield pair(f"{ours}norm{n}", f"{theirs}norm{n}", kind=Kind.NORM)


BLOCK, THEIRS = "blocks.{i:50}.", "transformer_blocks.{i:50}."

ROWS = (
    pair("video_patch_proj", "proj_in"),
    pair("audio_patch_proj", "audio_proj_in"),
    pair("condition_proj", "context_embedder"),
    pair("time_embedder.proj_in", "time_embedder.linear_1"),
    pair("time_embedder.proj_out", "time_embedder.linear_2"),
    *_block("token_refiner.blocks.{i:2}.", "token_refiner.refiner_blocks.{i:2}."),
    row("token_refiner.final_norm", kind=Kind.NORM),
    *_block(BLOCK, THEIRS),
    pair(f"{BLOCK}adaln_proj.linear", f"{THEIRS}adaln_proj.linear"),
    pair("final_layer.norm", "norm_out.norm", kind=Kind.NORM),
    pair("final_layer.adaln_proj.linear", "norm_out.linear"),
    pair("final_layer.video_out", "proj_out"),
    pair("final_layer.audio_out", "audio_proj_out"),
)

SIZES = sizes(
    "21504x5376 5376x7168 28672x5376 5376x14336 5376x5120 2688x5376 96768x2688 10752x2688"
)

# no kohya or ComfyUI tags: outside diffusers each transformer's adapter is a file of its own
REFERENCE = Component(
    name="transformer_ref",
    title="MiniMax-H3 transformer (references)",
    rows=ROWS,
    checkpoints={"diffusers": ("transformer_ref.",)},
    tags={"diffusers": ("transformer_ref",)},
    sizes=SIZES,
)

FAMILY = ModelFamily(
    name="minimax-h3",
    title="MiniMax-H3",
    components=(transformer("MiniMax-H3 transformer", ROWS, sizes=SIZES), REFERENCE),
    marks=(
        Mark("transformer", "attn.qkv_proj", columns=5376),
        Mark("transformer", "attn.out_proj", rows=5376),
        Mark("transformer", "mlp.fc1", columns=5376),
    ),
    architectures=("minimax-h3", "minimax_h3", "minimaxh3"),
    modelspec="MiniMax-H3",
    interleaved=((".attn.qkv_proj", 128),),
)
