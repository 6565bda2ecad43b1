"""LTX-Video (0.9): 1.9 G parameters, 28 blocks, 2048 wide; T5-XXL."""

from __future__ import annotations

from adaptkit.families._ltx import attention, ends, feed_forward, table
from adaptkit.families.contract import Mark, ModelFamily, transformer

BLOCK = "transformer_blocks.{i:28}."

ROWS = (
    *ends(),
    *attention(f"{BLOCK}attn1"),
    *attention(f"{BLOCK}attn2"),
    *feed_forward(f"{BLOCK}ff"),
    table(f"{BLOCK}scale_shift_table"),
)

FAMILY = ModelFamily(
    name="ltx",
    title="LTX-Video",
    components=(transformer("LTX-Video transformer", ROWS),),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=2048),
        Mark("transformer", ".attn2.to_k", columns=2048),
        Mark("transformer", ".ff.net.0.proj", rows=8192),
    ),
    architectures=("ltx-video", "ltxv", "ltx_video"),
    modelspec="ltx-video",
)
