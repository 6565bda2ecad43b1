"""HunyuanVideo (text and image to video): 13 G parameters; Llama 3 8B and CLIP-L."""

from __future__ import annotations

from adaptkit.families._clip import clip_l
from adaptkit.families._hunyuan import SIZES, marks, video_rows
from adaptkit.families._llm import llm, llm_rows
from adaptkit.families.contract import ModelFamily, sizes, transformer

FAMILY = ModelFamily(
    name="hunyuan-video",
    title="HunyuanVideo",
    components=(
        transformer(
            "HunyuanVideo transformer", video_rows(), sizes=sizes(SIZES, 3072), comfy="comfy"
        ),
        llm("Llama 3 8B", llm_rows(32), comfy="llama", kohya=()),
        clip_l(name="text_encoder_2", kohya=()),
    ),
    marks=marks(3072),
    # also a prefix of HunyuanVideo 1.5's names, which has another width
    architectures=("hunyuan-video", "hunyuan_video"),
    modelspec="hunyuan-video",
    # fused attention alone, or the first 19 and 38 blocks in ComfyUI's names, fit both
    yields_to=("flux",),
)
