"""Stable Diffusion: sd-scripts' names of U-Nets and CLIP."""

from __future__ import annotations

from types import SimpleNamespace

from tests.interop.published.contract import Case, State, kohya, shapes

CLIP_L = """
text_model.encoder.layers.{0,11}.self_attn.{q,k,v,out}_proj 768x768
text_model.encoder.layers.{0,11}.mlp.fc1 3072x768
text_model.encoder.layers.{0,11}.mlp.fc2 768x3072
"""
CLIP_G = """
text_model.encoder.layers.{0,31}.self_attn.{q,k,v,out}_proj 1280x1280
text_model.encoder.layers.{0,31}.mlp.fc1 5120x1280
text_model.encoder.layers.{0,31}.mlp.fc2 1280x5120
"""


def _transformer(block: str, width: int, context: int) -> str:
    return f"""
    {block}.proj_{{in,out}} {width}x{width}
    {block}.transformer_blocks.0.attn1.to_{{q,k,v,out.0}} {width}x{width}
    {block}.transformer_blocks.0.attn2.to_{{q,out.0}} {width}x{width}
    {block}.transformer_blocks.0.attn2.to_{{k,v}} {width}x{context}
    {block}.transformer_blocks.0.ff.net.0.proj {8 * width}x{width}
    {block}.transformer_blocks.0.ff.net.2 {width}x{4 * width}
    """


# Stable Diffusion 1 in diffusers' names, convolutions too
SD1 = shapes(
    _transformer("down_blocks.0.attentions.0", 320, 768).replace("320x320\n", "320x320x1x1\n", 1),
    _transformer("mid_block.attentions.0", 1280, 768).replace("1280x1280\n", "1280x1280x1x1\n", 1),
    """
    down_blocks.0.resnets.{0,1}.conv{1,2} 320x320x3x3
    down_blocks.1.resnets.0.conv1 640x320x3x3
    down_blocks.1.resnets.0.conv_shortcut 640x320x1x1
    down_blocks.1.resnets.0.time_emb_proj 640x1280
    down_blocks.0.downsamplers.0.conv 320x320x3x3
    up_blocks.1.upsamplers.0.conv 1280x1280x3x3
    mid_block.resnets.1.conv1 1280x1280x3x3
    conv_in 320x4x3x3
    conv_out 4x320x3x3
    time_embedding.linear_1 1280x320
    time_embedding.linear_2 1280x1280
    """,
)
# SDXL in its own names
SDXL = shapes(
    _transformer("input_blocks.4.1", 640, 2048),
    _transformer("input_blocks.8.1", 1280, 2048),
    _transformer("middle_block.1", 1280, 2048),
    _transformer("output_blocks.0.1", 1280, 2048),
    _transformer("output_blocks.5.1", 640, 2048),
    """
    input_blocks.0.0 320x4x3x3
    input_blocks.1.0.in_layers.2 320x320x3x3
    input_blocks.1.0.out_layers.3 320x320x3x3
    input_blocks.3.0.op 320x320x3x3
    input_blocks.4.0.emb_layers.1 640x1280
    input_blocks.4.0.skip_connection 640x320x1x1
    middle_block.{0,2}.in_layers.2 1280x1280x3x3
    output_blocks.2.2.conv 1280x1280x3x3
    output_blocks.3.0.out_layers.3 640x640x3x3
    out.2 4x320x3x3
    time_embed.0 1280x320
    time_embed.2 1280x1280
    """,
)
LABELS = shapes("label_emb.0.0 1280x2816\nlabel_emb.0.2 1280x1280")


def sd1() -> State:
    return kohya(SD1) | kohya(shapes(CLIP_L), "lora_te_")


def sdxl() -> State:
    return (
        kohya(SDXL | LABELS)
        | kohya(shapes(CLIP_L), "lora_te1_")
        | kohya(shapes(CLIP_G), "lora_te2_")
    )


def dora() -> State:
    return kohya(SD1, dora="dora_scale") | kohya(shapes(CLIP_L), "lora_te_", dora="dora_scale")


UNET = {"unet_config": SimpleNamespace(layers_per_block=2)}

ALPHAS = "the loader does not find the alphas of attention, under the names of the factors, nor magnitudes"
MISNAMED = "it leaves `down` in the names of the magnitudes of CLIP's MLPs"
MAGNITUDES = {r"text_encoder\..*\.mlp\.fc[12]\.lora_magnitude_vector": MISNAMED}
DOWN = {r"text_encoder\..*\.mlp\.fc[12]\.lora_magnitude_vector\.down": MISNAMED}

CASES = {
    "_convert_non_diffusers_lora_to_diffusers": (
        Case("StableDiffusion", "sd1", "kohya", sd1, options=UNET, later=ALPHAS),
        Case(
            "StableDiffusion",
            "sd1",
            "kohya",
            dora,
            lost=MAGNITUDES,
            stray=DOWN,
            options=UNET,
            later=ALPHAS,
        ),
    ),
    "_maybe_map_sgm_blocks_to_diffusers": (
        Case("StableDiffusionXL", "sdxl", "kohya", sdxl, options=UNET, later=ALPHAS),
    ),
}
