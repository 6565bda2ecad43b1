"""FramePack (and F1): HunyuanVideo with embeddings of past frames and of an image.

It has diffusers' names only. Its modules have HunyuanVideo's targets, whose adapters fit. Source:
lllyasviel's `diffusers_helper/models/hunyuan_video_packed.py`, diffusers'
`HunyuanVideoFramepackTransformer3DModel`.
"""

from __future__ import annotations

from adaptkit.families._clip import clip_l
from adaptkit.families._hunyuan import SIZES as SIZES_OF_VIDEO
from adaptkit.families._hunyuan import marks, video_rows
from adaptkit.families._llm import llm, llm_rows
from adaptkit.families.contract import ModelFamily, row, sizes, transformer

ROWS = (
    *(same._replace(names={"diffusers": same.names["diffusers"]}) for same in video_rows()),
    row("image_projection.up"),
    row("image_projection.down"),
    row("clean_x_embedder.proj", kernel=(1, 2, 2)),
    row("clean_x_embedder.proj_2x", kernel=(2, 4, 4)),
    row("clean_x_embedder.proj_4x", kernel=(4, 8, 8)),
)

SIZES = sizes(f"{SIZES_OF_VIDEO} 3dx1152 dx3d", 3072)

FAMILY = ModelFamily(
    name="framepack",
    title="FramePack",
    components=(
        transformer(
            "FramePack transformer", ROWS, sizes=SIZES, kohya="diffusers", comfy="diffusers"
        ),
        llm("Llama 3 8B", llm_rows(32), comfy="llama", kohya=()),
        clip_l(name="text_encoder_2", kohya=()),
    ),
    marks=marks(3072),
    architectures=("framepack",),
    modelspec="framepack",
    yields_to=("hunyuan-video", "flux"),
)
