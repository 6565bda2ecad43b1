"""Video and sound: HunyuanVideo, Wan, LTX, MiniMax-H3, ACE-Step."""

from __future__ import annotations

from tests.interop.published.contract import ALPHAS, Case, Shapes, State, kohya, lora, shapes

HUNYUAN_BLOCKS = """
double_blocks.{0,19}.{img,txt}_mod.linear 18432x3072
double_blocks.{0,19}.{img,txt}_attn_qkv 9216x3072
double_blocks.{0,19}.{img,txt}_attn_proj 3072x3072
double_blocks.{0,19}.{img,txt}_mlp.fc1 12288x3072
double_blocks.{0,19}.{img,txt}_mlp.fc2 3072x12288
single_blocks.{0,39}.linear1 21504x3072
single_blocks.{0,39}.linear2 3072x15360
single_blocks.{0,39}.modulation.linear 9216x3072
"""
HUNYUAN = shapes(HUNYUAN_BLOCKS, "final_layer.linear 64x3072")
HUNYUAN_ENDS = shapes("""
img_in.proj 3072x16x1x2x2
{time_in,guidance_in,txt_in.t_embedder}.mlp.0 3072x256
{time_in,guidance_in,txt_in.t_embedder}.mlp.2 3072x3072
vector_in.in_layer 3072x768
vector_in.out_layer 3072x3072
txt_in.input_embedder 3072x4096
txt_in.c_embedder.linear_1 3072x4096
txt_in.c_embedder.linear_2 3072x3072
txt_in.individual_token_refiner.blocks.{0,1}.self_attn_proj 3072x3072
txt_in.individual_token_refiner.blocks.{0,1}.mlp.fc1 12288x3072
txt_in.individual_token_refiner.blocks.{0,1}.mlp.fc2 3072x12288
txt_in.individual_token_refiner.blocks.{0,1}.adaLN_modulation.1 6144x3072
final_layer.adaLN_modulation.1 6144x3072
""")

WAN_BLOCKS = """
blocks.{0,1}.self_attn.{q,k,v,o} 5120x5120
blocks.{0,1}.cross_attn.{q,k,v,o} 5120x5120
blocks.{0,1}.ffn.0 13824x5120
blocks.{0,1}.ffn.2 5120x13824
"""
WAN = shapes(WAN_BLOCKS)
WAN_IMAGE = WAN | shapes("blocks.{0,1}.cross_attn.{k,v}_img 5120x5120")
WAN_ENDS = shapes("""
text_embedding.0 5120x4096
text_embedding.2 5120x5120
time_embedding.0 5120x256
time_embedding.2 5120x5120
time_projection.1 30720x5120
head.head 64x5120
""")
WAN_EMBEDDER = shapes("img_emb.proj.1 1280x1280\nimg_emb.proj.3 5120x1280")

LTX_NAMES = """
transformer_blocks.{0,1}.attn{1,2}.to_{q,k,v,out.0} 2048x2048
transformer_blocks.{0,1}.ff.net.0.proj 8192x2048
transformer_blocks.{0,1}.ff.net.2 2048x8192
"""
LTX = shapes(LTX_NAMES)

LTX2 = shapes("""
transformer_blocks.{0,47}.{attn1,attn2}.to_{q,k,v,out.0} 4096x4096
transformer_blocks.{0,47}.{audio_attn1,audio_attn2}.to_{q,k,v,out.0} 2048x2048
transformer_blocks.{0,47}.audio_to_video_attn.to_q 2048x4096
transformer_blocks.{0,47}.audio_to_video_attn.to_{k,v} 2048x2048
transformer_blocks.{0,47}.audio_to_video_attn.to_out.0 4096x2048
transformer_blocks.{0,47}.video_to_audio_attn.to_{q,out.0} 2048x2048
transformer_blocks.{0,47}.video_to_audio_attn.to_{k,v} 2048x4096
transformer_blocks.{0,47}.ff.net.0.proj 16384x4096
transformer_blocks.{0,47}.ff.net.2 4096x16384
transformer_blocks.{0,47}.audio_ff.net.0.proj 8192x2048
transformer_blocks.{0,47}.audio_ff.net.2 2048x8192
patchify_proj 4096x128
audio_patchify_proj 2048x128
proj_out 128x4096
audio_proj_out 128x2048
{adaln,prompt_adaln,av_ca_video_scale_shift_adaln,av_ca_a2v_gate_adaln}_single.emb.timestep_embedder.linear_1 4096x256
{adaln,prompt_adaln,av_ca_video_scale_shift_adaln,av_ca_a2v_gate_adaln}_single.emb.timestep_embedder.linear_2 4096x4096
audio_{adaln,prompt_adaln}_single.emb.timestep_embedder.linear_1 2048x256
av_ca_{audio_scale_shift,v2a_gate}_adaln_single.emb.timestep_embedder.linear_1 2048x256
audio_{adaln,prompt_adaln}_single.emb.timestep_embedder.linear_2 2048x2048
av_ca_{audio_scale_shift,v2a_gate}_adaln_single.emb.timestep_embedder.linear_2 2048x2048
adaln_single.linear 24576x4096
prompt_adaln_single.linear 8192x4096
audio_adaln_single.linear 12288x2048
audio_prompt_adaln_single.linear 4096x2048
av_ca_video_scale_shift_adaln_single.linear 16384x4096
av_ca_a2v_gate_adaln_single.linear 4096x4096
av_ca_audio_scale_shift_adaln_single.linear 8192x2048
av_ca_v2a_gate_adaln_single.linear 2048x2048
""")
LTX2_PROJECTION = shapes("aggregate_embed 3840x188160")
LTX2_CONNECTORS = shapes(
    "{video,audio}_embeddings_connector.transformer_1d_blocks.{0,1}.attn1.to_{q,k,v,out.0} 3840x3840"
)


def ltx2() -> State:
    return (
        lora(LTX2, "diffusion_model.")
        | lora(LTX2_PROJECTION, "text_embedding_projection.")
        | lora(LTX2_CONNECTORS, "diffusion_model.")
    )


H3 = shapes("""
blocks.{0,49}.attn.qkv_proj 21504x5376
blocks.{0,49}.attn.out_proj 5376x7168
blocks.{0,49}.mlp.fc1 28672x5376
blocks.{0,49}.mlp.fc2 5376x14336
blocks.{0,49}.adaln_proj.linear 96768x2688
token_refiner.blocks.{0,1}.attn.qkv_proj 21504x5376
token_refiner.blocks.{0,1}.attn.out_proj 5376x7168
token_refiner.blocks.{0,1}.mlp.fc1 28672x5376
token_refiner.blocks.{0,1}.mlp.fc2 5376x14336
video_patch_proj 5376x96
audio_patch_proj 5376x32
condition_proj 5376x5120
time_embedder.proj_in 5376x256
time_embedder.proj_out 2688x5376
final_layer.adaln_proj.linear 10752x2688
final_layer.video_out 96x5376
final_layer.audio_out 32x5376
""")


def diffsynth() -> State:
    """DiffSynth-Studio: PEFT's name of the adapter in the keys, and queries, keys and values head by head."""
    return {key.replace(".weight", ".default.weight"): t for key, t in lora(H3).items()}


ACE_STEP = shapes("""
layers.{0,23}.{self,cross}_attn.{q,o}_proj 2048x2048
layers.{0,23}.{self,cross}_attn.{k,v}_proj 1024x2048
layers.{0,23}.mlp.{gate,up}_proj 6144x2048
layers.{0,23}.mlp.down_proj 2048x6144
""")


def biased(found: Shapes) -> State:
    """As Wan's distillations have it, biases too and norms' differences beside."""
    return lora(found, "diffusion_model.", bias="diff_b")


TENCENT = "adaptkit writes the names of ComfyUI's modules, and the loader knows Tencent's by `img_attn_qkv`"
ENDINGS = {
    r"transformer\.norm_out\.linear": "it swaps the rank of the first factor with the rows of the second"
}
DIFFUSERS = "without a prefix adaptkit writes diffusers' names"
CONNECTORS = {
    r"connectors\..*_connector\..*": "it takes the connectors for a part of the transformer",
}
STRAY = {
    r"transformer\..*_embeddings_connector\..*": "it takes the connectors for a part of the transformer"
}

CASES = {
    "_convert_hunyuan_video_lora_to_diffusers": (
        Case("HunyuanVideo", "hunyuan-video", "comfy", lambda: lora(HUNYUAN | HUNYUAN_ENDS, "diffusion_model."), wrong=ENDINGS, unwritten=TENCENT),
        Case("HunyuanVideo", "hunyuan-video", "comfy", lambda: lora(HUNYUAN, "transformer."), unwritten=TENCENT),
    ),
    "_convert_non_diffusers_wan_lora_to_diffusers": (
        Case("Wan", "wan", "comfy", lambda: biased(WAN_IMAGE | WAN_ENDS | WAN_EMBEDDER)),
        Case("Wan", "wan", "comfy", lambda: lora(WAN, "diffusion_model.", alpha=ALPHAS)),
    ),
    "_convert_musubi_wan_lora_to_diffusers": (
        Case("Wan", "wan", "kohya", lambda: kohya(WAN)),
        Case("SkyReelsV2", "wan", "kohya", lambda: kohya(WAN_IMAGE)),
    ),
    "_convert_non_diffusers_ltxv_lora_to_diffusers": (
        Case("LTXVideo", "ltx", "comfy", lambda: lora(LTX, "diffusion_model.")),
    ),
    "_convert_non_diffusers_ltx2_lora_to_diffusers": (
        Case("LTX2", "ltx2", "comfy", ltx2, lost=CONNECTORS, stray=STRAY),
    ),
    "_convert_non_diffusers_minimax_h3_lora_to_diffusers": (
        Case("MiniMaxH3", "minimax-h3", "kohya", lambda: kohya(H3)),
        Case("MiniMaxH3", "minimax-h3", "comfy", lambda: lora(H3, "diffusion_model.", alpha=ALPHAS)),
        Case("MiniMaxH3", "minimax-h3", "bare", lambda: lora(H3), unwritten=DIFFUSERS),
        Case("MiniMaxH3", "minimax-h3", "bare", diffsynth, unwritten=DIFFUSERS),
    ),
    "_convert_non_diffusers_ace_step_lora_to_diffusers": (
        Case("AceStep", "ace-step", "peft", lambda: lora(ACE_STEP, "base_model.model.")),
    ),
}  # fmt: skip
