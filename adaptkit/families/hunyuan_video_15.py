"""HunyuanVideo 1.5: 8 G parameters, 54 double blocks; Qwen2.5-VL 7B and ByT5.

No adapter is trained for ByT5. q, k and v are separate in Tencent's checkpoint, fused in ComfyUI.
Source: Tencent-Hunyuan `HunyuanVideo-1.5`, ComfyUI's layers and diffusers'
`HunyuanVideo15Transformer3DModel`.
"""

from __future__ import annotations

from adaptkit.families._hunyuan import byt5, double_blocks, embedder, ends, marks
from adaptkit.families._llm import llm, llm_rows
from adaptkit.families.contract import Kind, ModelFamily, pair, sizes, transformer

VISION = (("0", "norm_in"), ("1", "linear_1"), ("3", "linear_2"), ("4", "norm_out"))

ROWS = (
    *ends((1, 1, 1)),
    *embedder("time_in", "time_embed.timestep_embedder"),
    # mean flow: only in super-resolution and step-distilled models
    *embedder("time_r_in", "time_embed.timestep_embedder_r"),
    pair(
        "cond_type_embedding", "cond_type_embed", comfy="cond_type_embedding", kind=Kind.EMBEDDING
    ),
    *byt5(),
    *(
        pair(
            f"vision_in.proj.{n}",
            f"image_embedder.{name}",
            comfy=f"vision_in.proj.{n}",
            kind=Kind.NORM if name.startswith("norm") else Kind.MATRIX,
        )
        for n, name in VISION
    ),
    *double_blocks(54, fused=False),
)

SIZES = sizes("dxd 2dxd 3dxd 4dxd 6dxd dx4d dx1152 dx1472 dx3584 1152x1152", 2048)

FAMILY = ModelFamily(
    name="hunyuan-video-15",
    title="HunyuanVideo 1.5",
    components=(
        transformer("HunyuanVideo 1.5 transformer", ROWS, sizes=SIZES, comfy="comfy"),
        llm("Qwen2.5-VL 7B", llm_rows(28), comfy="qwen25_7b", kohya=()),
    ),
    marks=marks(2048, qkv="img_attn.qkv"),
    architectures=("hunyuan-video-1.5", "hunyuan_video_1_5", "hunyuan_video_1.5"),
    modelspec="hunyuan-video-1.5",
    yields_to=("flux", "hunyuan-video"),  # if the shapes fit both
)
