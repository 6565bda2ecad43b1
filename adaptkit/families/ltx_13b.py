"""LTX-Video 13B (0.9.7 and later): 48 blocks, 4096 wide; T5-XXL.

Its blocks have the names and sizes of the video half of LTX-2.
"""

from __future__ import annotations

from adaptkit.families._ltx import video_rows
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

SIZES = sizes("dxd 4dxd dx4d 6dxd", 4096)

FAMILY = ModelFamily(
    name="ltx-13b",
    title="LTX-Video 13B",
    components=(transformer("LTX-Video 13B transformer", video_rows(48), sizes=SIZES),),
    marks=(
        Mark("transformer", ".attn1.to_q", columns=4096),
        Mark("transformer", ".attn2.to_k", columns=4096),
        Mark("transformer", ".ff.net.0.proj", rows=16384),
        Mark("transformer", "caption_projection.linear_1", columns=4096),
    ),
    architectures=("ltx-video-13b", "ltxv-13b", "ltx_video_13b"),
    modelspec="ltx-video-13b",
    twins=((".attn1.", ".attn2."),),  # as in LTX-Video
    # blocks alone fit both
    yields_to=("ltx2",),
)
