"""LTX-Video (0.9), 2B: 28 blocks, 2048 wide; T5-XXL."""

from __future__ import annotations

from adaptkit.families._ltx import video_rows
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

SIZES = sizes("dxd 4dxd dx4d 6dxd dx4096", 2048)

FAMILY = ModelFamily(
    name="ltx",
    title="LTX-Video",
    components=(transformer("LTX-Video transformer", video_rows(28), sizes=SIZES),),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=2048),
        Mark("transformer", ".attn2.to_k", columns=2048),
        Mark("transformer", ".ff.net.0.proj", rows=8192),
    ),
    architectures=("ltx-video", "ltxv", "ltx_video"),
    modelspec="ltx-video",
    # many models have blocks of attn1 and ff alone
    twins=((".attn1.", ".attn2."),),
)
