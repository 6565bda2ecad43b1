"""LTX-2, 2.3 and 2.5: video with sound, 48 blocks, 4096 wide for video and 2048 for sound; Gemma 3.

2.3 has gates in its attention and a modulation of the prompt, and no caption projection. The
connectors between Gemma and the transformer are a component in diffusers; in the single file they
lie beside the transformer's blocks, and their projections under `text_embedding_projection`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._ltx import adaln, attention, ends, feed_forward, table
from adaptkit.families.contract import (
    NATIVE_PREFIXES,
    Component,
    Mark,
    ModelFamily,
    Row,
    pair,
    sizes,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = "transformer_blocks.{i:48}."
ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)
CROSS = (
    ("video_scale_shift", "video_scale_shift"),
    ("audio_scale_shift", "audio_scale_shift"),
    ("a2v_gate", "video_a2v_gate"),
    ("v2a_gate", "audio_v2a_gate"),
)

ROWS = (
    *ends(),
    *ends("audio_"),
    *(
        made
        for ours, theirs in CROSS
        for made in adaln(f"av_ca_{ours}_adaln_single", f"av_cross_attn_{theirs}")
    ),
    *adaln("prompt_adaln_single", "prompt_adaln"),
    *adaln("audio_prompt_adaln_single", "audio_prompt_adaln"),
    *(made for name in ATTENTIONS for made in attention(BLOCK + name, gate=True)),
    *feed_forward(f"{BLOCK}ff"),
    *feed_forward(f"{BLOCK}audio_ff"),
    table(f"{BLOCK}scale_shift_table"),
    table(f"{BLOCK}audio_scale_shift_table"),
    table(f"{BLOCK}prompt_scale_shift_table"),
    table(f"{BLOCK}audio_prompt_scale_shift_table"),
    table("keyframes_abs_pos_embedding"),  # LTX-2.5
    *(
        table(
            f"{BLOCK}scale_shift_table_a2v_ca_{side}",
            f"{BLOCK}{side}_a2v_cross_attn_scale_shift_table",
        )
        for side in ("video", "audio")
    ),
)

# the second width is that of the sound; 9d: with the modulation of the prompt
SIZES = sizes("dxd 2dxd 4dxd dx4d 6dxd 9dxd dx3840", 4096, 2048) | sizes("2048x4096 4096x2048")


def _connectors() -> Iterator[Row]:
    for side in ("video", "audio"):
        ours, theirs = f"{side}_embeddings_connector.", f"{side}_connector."
        yield table(f"{ours}learnable_registers", f"{theirs}learnable_registers")
        block, their_block = (
            f"{ours}transformer_1d_blocks.{{i:8}}.",
            f"{theirs}transformer_blocks.{{i:8}}.",
        )
        yield from attention(f"{block}attn1", f"{their_block}attn1", gate=True)
        yield from feed_forward(f"{block}ff", f"{their_block}ff")


CONNECTORS = Component(
    name="connectors",
    title="LTX-2 connectors",
    rows=tuple(_connectors()),
    checkpoints={"native": NATIVE_PREFIXES, "diffusers": ("connectors.",)},
    tags={
        "kohya": ("unet",),
        "comfy": ("diffusion_model", "model.diffusion_model"),
        "root": ("",),
        "diffusers": ("connectors",),
    },
    namings={"kohya": "native", "comfy": "native"},
    sizes=sizes("dxd 4dxd dx4d", 3840, 4096, 2048),
    apart=True,
)

PROJECTION = Component(
    name="text_projection",
    title="LTX-2 text projection",
    rows=(
        pair("aggregate_embed", "text_proj_in"),
        pair("video_aggregate_embed", "video_text_proj_in"),
        pair("audio_aggregate_embed", "audio_text_proj_in"),
    ),
    checkpoints={
        "native": tuple(f"{prefix}text_embedding_projection." for prefix in ("", "model.")),
        "diffusers": ("connectors.",),
    },
    tags={"comfy": ("text_embedding_projection",), "diffusers": ("connectors",)},
    namings={"comfy": "native"},
    apart=True,
)

FAMILY = ModelFamily(
    name="ltx2",
    title="LTX-2",
    components=(
        transformer("LTX-2 transformer", ROWS, sizes=SIZES),
        CONNECTORS,
        PROJECTION,
    ),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=4096),
        Mark("transformer", ".attn2.to_k", columns=4096),
        Mark("transformer", ".ff.net.0.proj", rows=16384),
        Mark("transformer", "caption_projection.linear_1", columns=3840),
    ),
    architectures=("ltx-2", "ltx2", "ltx_2", "ltxv2"),
    modelspec="ltx-2",
    twins=((".attn1.", ".attn2."),),  # as in LTX-Video
)
