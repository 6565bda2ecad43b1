"""LTX-Video (0.9): 28 blocks, 2048 wide (2B), or 48 blocks, 4096 wide (13B); T5-XXL."""

from __future__ import annotations

from adaptkit.families._ltx import attention, ends, feed_forward, table
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "transformer_blocks.{i:48}."

ROWS = (
    *ends(),
    *attention(f"{BLOCK}attn1"),
    *attention(f"{BLOCK}attn2"),
    *feed_forward(f"{BLOCK}ff"),
    table(f"{BLOCK}scale_shift_table"),
)

SIZES = sizes("dxd 4dxd dx4d 6dxd dx4096", 2048, 4096)

FAMILY = ModelFamily(
    name="ltx",
    title="LTX-Video",
    components=(transformer("LTX-Video transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=(2048, 4096)),
        Mark("transformer", ".attn2.to_k", columns=(2048, 4096)),
        Mark("transformer", ".ff.net.0.proj", rows=(8192, 16384)),
    ),
    architectures=("ltx-video", "ltxv", "ltx_video"),
    modelspec="ltx-video",
    # many models have blocks of attn1 and ff alone
    twins=((".attn1.", ".attn2."),),
)
