"""HunyuanImage 2.1: 17 G parameters, 20 double and 40 single blocks; Qwen2.5-VL 7B and ByT5.

No adapter is trained for ByT5. Source: Tencent-Hunyuan `HunyuanImage-2.1`, ComfyUI's layers and
diffusers' `HunyuanImageTransformer2DModel`.
"""

from __future__ import annotations

from adaptkit.families._hunyuan import byt5, double_blocks, embedder, ends, marks, single_blocks
from adaptkit.families._llm import llm, llm_rows
from adaptkit.families.contract import ModelFamily, sizes, transformer

ROWS = (
    *ends((1, 1)),
    *embedder("time_in", "time_guidance_embed.timestep_embedder"),
    # mean flow and guidance: only in the distilled model
    *embedder("time_r_in", "time_guidance_embed.timestep_embedder_r"),
    *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    *byt5(),
    *double_blocks(20),
    *single_blocks(40),
)

# 2048 wide: the embedder of ByT5
SIZES = sizes("dxd 2dxd 3dxd 4dxd 6dxd 7dxd dx4d dx5d", 3584) | sizes("2048x1472 dxd 3584xd", 2048)

FAMILY = ModelFamily(
    name="hunyuan-image",
    title="HunyuanImage 2.1",
    components=(
        transformer("HunyuanImage transformer", ROWS, sizes=SIZES, comfy="comfy"),
        llm("Qwen2.5-VL 7B", llm_rows(28), comfy="qwen25_7b", kohya=()),
    ),
    marks=marks(3584),
    architectures=("hunyuan-image", "hunyuan_image"),
    modelspec="hunyuan-image-2.1",
    yields_to=("flux",),  # if the shapes fit both
)
