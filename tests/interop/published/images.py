"""Image models besides FLUX: Lumina 2, HiDream, Qwen-Image, Anima, Z-Image, Ideogram 4, Krea 2."""

from __future__ import annotations

from tests.interop.published.contract import (
    ALPHAS,
    DOTTED,
    KOHYA,
    Case,
    State,
    kohya,
    lokr,
    lora,
    shapes,
)

LUMINA2 = shapes("""
{noise_refiner,context_refiner,layers}.{0,1}.attention.qkv 3840x2304
{noise_refiner,context_refiner,layers}.{0,1}.attention.out 2304x2304
{noise_refiner,context_refiner,layers}.{0,1}.feed_forward.w{1,3} 9216x2304
{noise_refiner,context_refiner,layers}.{0,1}.feed_forward.w2 2304x9216
{noise_refiner,layers}.{0,1}.adaLN_modulation.1 9216x1024
""")
HIDREAM = shapes("""
double_stream_blocks.{0,15}.block.attn1.to_{q,k,v,out,q_t,k_t,v_t,out_t} 2560x2560
double_stream_blocks.{0,15}.block.adaLN_modulation.1 30720x2560
{double,single}_stream_blocks.{0,15}.block.ff_i.shared_experts.w{1,3} 3584x2560
{double,single}_stream_blocks.{0,15}.block.ff_i.shared_experts.w2 2560x3584
{double,single}_stream_blocks.{0,15}.block.ff_i.experts.{0,3}.w{1,3} 6912x2560
{double,single}_stream_blocks.{0,15}.block.ff_i.experts.{0,3}.w2 2560x6912
single_stream_blocks.{0,15}.block.attn1.to_{q,k,v,out} 2560x2560
caption_projection.{0,48}.linear 2560x4096
t_embedder.timestep_embedder.linear_1 2560x256
final_layer.linear 64x2560
""")
QWEN_BLOCKS = shapes("""
transformer_blocks.{0,59}.attn.{to_q,to_k,to_v,to_out.0,to_add_out} 3072x3072
transformer_blocks.{0,59}.attn.add_{q,k,v}_proj 3072x3072
transformer_blocks.{0,59}.{img,txt}_mod.1 18432x3072
transformer_blocks.{0,59}.{img,txt}_mlp.net.0.proj 12288x3072
transformer_blocks.{0,59}.{img,txt}_mlp.net.2 3072x12288
""")
QWEN = QWEN_BLOCKS | shapes("""
img_in 3072x64
txt_in 3072x3584
proj_out 64x3072
norm_out.linear 6144x3072
time_text_embed.timestep_embedder.linear_1 3072x256
time_text_embed.timestep_embedder.linear_2 3072x3072
""")


def default() -> State:
    """With PEFT's name of the adapter in the keys."""
    return {key.replace(".weight", ".default.weight"): t for key, t in lora(QWEN).items()}


ANIMA = shapes("""
blocks.{0,27}.self_attn.{q,k,v,output}_proj 2048x2048
blocks.{0,27}.cross_attn.{q,output}_proj 2048x2048
blocks.{0,27}.cross_attn.{k,v}_proj 2048x1024
blocks.{0,27}.mlp.layer1 8192x2048
blocks.{0,27}.mlp.layer2 2048x8192
blocks.{0,27}.adaln_modulation_{self_attn,cross_attn,mlp}.1 256x2048
blocks.{0,27}.adaln_modulation_{self_attn,cross_attn,mlp}.2 6144x256
llm_adapter.blocks.{0,5}.{self,cross}_attn.{q,k,v,o}_proj 1024x1024
llm_adapter.blocks.{0,5}.mlp.0 4096x1024
llm_adapter.blocks.{0,5}.mlp.2 1024x4096
llm_adapter.out_proj 1024x1024
x_embedder.proj.1 2048x68
t_embedder.1.linear_1 2048x2048
t_embedder.1.linear_2 6144x2048
final_layer.linear 64x2048
final_layer.adaln_modulation.1 256x2048
final_layer.adaln_modulation.2 4096x256
""")

Z_LAYERS = """
{layers,noise_refiner,context_refiner}.{0,1}.feed_forward.w{1,3} 10240x3840
{layers,noise_refiner,context_refiner}.{0,1}.feed_forward.w2 3840x10240
{layers,noise_refiner}.{0,1}.adaLN_modulation.0 15360x256
cap_embedder.1 3840x2560
t_embedder.mlp.0 1024x256
t_embedder.mlp.2 256x1024
"""
Z_SPLIT = shapes(
    Z_LAYERS,
    "{layers,noise_refiner,context_refiner}.{0,1}.attention.to_{q,k,v,out.0} 3840x3840",
)
Z_ENDS = shapes("""
all_x_embedder.2-1 3840x64
all_final_layer.2-1.linear 64x3840
all_final_layer.2-1.adaLN_modulation.1 3840x256
""")
# the checkpoint's own names
Z_FUSED = shapes(
    "{layers,noise_refiner,context_refiner}.{0,1}.attention.qkv 11520x3840",
    "{layers,noise_refiner,context_refiner}.{0,1}.attention.out 3840x3840",
    Z_LAYERS,
)

IDEOGRAM = shapes("""
layers.{0,33}.attention.qkv 13824x4608
layers.{0,33}.attention.o 4608x4608
layers.{0,33}.feed_forward.w{1,3} 12288x4608
layers.{0,33}.feed_forward.w2 4608x12288
layers.{0,33}.adaln_modulation 18432x512
""")

KREA2 = shapes("""
blocks.{0,27}.attn.{wq,wo,gate} 6144x6144
blocks.{0,27}.attn.{wk,wv} 1536x6144
blocks.{0,27}.mlp.{gate,up} 16384x6144
blocks.{0,27}.mlp.down 6144x16384
txtfusion.{layerwise,refiner}_blocks.{0,1}.attn.{wq,wk,wv,wo,gate} 2560x2560
txtfusion.{layerwise,refiner}_blocks.{0,1}.mlp.{gate,up} 6912x2560
txtfusion.{layerwise,refiner}_blocks.{0,1}.mlp.down 2560x6912
txtfusion.projector 1x12
first 6144x64
last.linear 64x6144
tmlp.0 6144x256
tmlp.2 6144x6144
tproj.1 36864x6144
txtmlp.1 6144x2560
txtmlp.3 6144x6144
""")

# it renames and splits joint projections in a kohya file and in Anime-Z's spelling alone
JOINT = "adaptkit writes the joint projections of ComfyUI's modules, with lora_A, and the converter takes both for layers"
ALONE = "without prefix and alpha the loader takes the file for its own, and adaptkit writes alpha here only where it differs"

CASES = {
    "_convert_non_diffusers_lumina2_lora_to_diffusers": (
        Case("Lumina2", "lumina2", "comfy", lambda: lora(LUMINA2, "diffusion_model.")),
    ),
    "_convert_non_diffusers_hidream_lora_to_diffusers": (
        Case("HiDreamImage", "hidream", "comfy", lambda: lora(HIDREAM, "diffusion_model.")),
    ),
    "_convert_non_diffusers_qwen_lora_to_diffusers": (
        Case("QwenImage", "qwen-image", "kohya", lambda: kohya(QWEN)),
        Case("QwenImage", "qwen-image", "comfy", lambda: lora(QWEN, "diffusion_model.")),
        Case("QwenImage", "qwen-image", "comfy", lambda: lora(QWEN, "diffusion_model.", alpha=ALPHAS)),
        Case("QwenImage", "qwen-image", "bare", lambda: lora(QWEN, roles=KOHYA, alpha=ALPHAS), unwritten=ALONE),
        Case("QwenImage", "qwen-image", "bare", default, unwritten=ALONE),
    ),
    "_convert_non_diffusers_anima_lora_to_diffusers": (
        Case("Anima", "anima", "comfy", lambda: lora(ANIMA, "diffusion_model.")),
    ),
    "_convert_non_diffusers_z_image_lora_to_diffusers": (
        Case("ZImage", "z-image", "kohya", lambda: kohya(Z_SPLIT)),
        Case("ZImage", "z-image", "comfy", lambda: lora(Z_SPLIT | Z_ENDS, "diffusion_model."), unwritten=JOINT),
        Case("ZImage", "z-image", "comfy", lambda: lora(Z_FUSED, "diffusion_model.", roles=DOTTED), unwritten=JOINT),
        Case("ZImage", "z-image", "kohya", lambda: kohya(Z_FUSED)),
    ),
    "_convert_non_diffusers_lokr_to_diffusers": (
        Case("ZImage", "z-image", "comfy", lambda: lokr(Z_SPLIT, "diffusion_model."), unwritten=JOINT),
    ),
    "_convert_non_diffusers_ideogram4_lora_to_diffusers": (
        Case("Ideogram4", "ideogram4", "comfy", lambda: lora(IDEOGRAM, "diffusion_model.")),
        Case("Ideogram4", "ideogram4", "comfy", lambda: lora(IDEOGRAM, "diffusion_model.", roles=KOHYA, alpha=ALPHAS)),
    ),
    "_convert_non_diffusers_krea2_lora_to_diffusers": (
        Case("Krea2", "krea2", "comfy", lambda: lora(KREA2, "diffusion_model.")),
        Case(
            "Krea2", "krea2", "comfy", lambda: lora(KREA2, "base_model.model."),
            prefix=("diffusion_model.", "base_model.model."),
        ),
    ),
}  # fmt: skip
