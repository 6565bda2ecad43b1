"""LTX-2: video with sound, 48 blocks, 4096 wide for the video and 2048 for the sound; Gemma 3."""

from __future__ import annotations

from adaptkit.families._ltx import adaln, attention, ends, feed_forward, table
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

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
    *(made for name in ATTENTIONS for made in attention(BLOCK + name)),
    *feed_forward(f"{BLOCK}ff"),
    *feed_forward(f"{BLOCK}audio_ff"),
    table(f"{BLOCK}scale_shift_table"),
    table(f"{BLOCK}audio_scale_shift_table"),
    *(
        table(
            f"{BLOCK}scale_shift_table_a2v_ca_{side}",
            f"{BLOCK}{side}_a2v_cross_attn_scale_shift_table",
        )
        for side in ("video", "audio")
    ),
)

# the second width is that of the sound
SIZES = sizes("dxd 4dxd dx4d 6dxd dx3840", 4096, 2048) | sizes("2048x4096 4096x2048")

FAMILY = ModelFamily(
    name="ltx2",
    title="LTX-2",
    components=(transformer("LTX-2 transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=4096),
        Mark("transformer", ".attn2.to_k", columns=4096),
        Mark("transformer", ".ff.net.0.proj", rows=16384),
    ),
    architectures=("ltx-2", "ltx2", "ltx_2", "ltxv2"),
    modelspec="ltx-2",
    twins=((".attn1.", ".attn2."),),  # as in LTX-Video
    yields_to=("ltx",),
)
