"""FLUX.1, FLUX.2 and FLUX.3: nine converters."""

from __future__ import annotations

import torch

from tests.interop.published.contract import (
    ALPHAS,
    KOHYA,
    OLD,
    Case,
    Numbers,
    Shapes,
    State,
    kohya,
    lokr,
    lora,
    shapes,
)
from tests.interop.published.unet import CLIP_L

BLOCKS = """
double_blocks.DOUBLE.{img,txt}_mod.lin 18432x3072
double_blocks.DOUBLE.{img,txt}_attn.qkv 9216x3072
double_blocks.DOUBLE.{img,txt}_attn.proj 3072x3072
double_blocks.DOUBLE.{img,txt}_mlp.0 12288x3072
double_blocks.DOUBLE.{img,txt}_mlp.2 3072x12288
single_blocks.SINGLE.linear1 21504x3072
single_blocks.SINGLE.linear2 3072x15360
single_blocks.SINGLE.modulation.lin 9216x3072
"""
ENDS = """
img_in 3072x64
txt_in 3072x4096
{time,guidance}_in.in_layer 3072x256
vector_in.in_layer 3072x768
{time,guidance,vector}_in.out_layer 3072x3072
"""
FINAL = "final_layer.linear 64x3072"
MODULATION = "final_layer.adaLN_modulation.1 6144x3072"


def flux(*more: str, whole: bool = False) -> Shapes:
    """FLUX.1's modules: the first and the last block of both kinds, or all."""
    double, single = ("{0..18}", "{0..37}") if whole else ("{0,18}", "{0,37}")
    return shapes(BLOCKS.replace("DOUBLE", double).replace("SINGLE", single), *more)


def sparse() -> State:
    """Parts that are trained apart: each has its own rows of the factors (`split_qkv` of sd-scripts)."""
    numbers = Numbers(3)
    state = kohya(flux())
    for key in [key for key in state if key.endswith("_qkv.lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        up = numbers(9216, 6).view(3, 3072, 3, 2)
        for n in range(3):
            up[n, :, [m for m in range(3) if m != n]] = 0
        state[key], state[f"{stem}.lora_up.weight"] = numbers(6, 3072), up.reshape(9216, 6)
        state[f"{stem}.alpha"] = torch.tensor(3.0)
    return state


def control() -> State:
    """black-forest-labs' control LoRAs: all modules with biases, and the norms themselves."""
    found = flux(ENDS.replace("img_in 3072x64", "img_in 3072x128"), FINAL, MODULATION, whole=True)
    numbers = Numbers(5)
    norms = [f"double_blocks.{n}.{side}_attn.norm" for n in range(19) for side in ("img", "txt")]
    norms += [f"single_blocks.{n}.norm" for n in range(38)]
    return lora(found, rank=2, bias="lora_B.bias") | {
        f"{name}.{word}_norm.scale": numbers(128) for name in norms for word in ("query", "key")
    }


ONETRAINER = shapes("""
transformer_blocks.{0,18}.attn.{to_q,to_k,to_v,to_out.0,to_add_out} 3072x3072
transformer_blocks.{0,18}.attn.add_{q,k,v}_proj 3072x3072
single_transformer_blocks.{0,37}.attn.to_{q,k,v} 3072x3072
context_embedder 3072x4096
x_embedder 3072x64
""")


def mixture() -> State:
    return kohya(ONETRAINER, "lora_transformer_") | kohya(shapes(CLIP_L), "lora_te1_")


XLABS = shapes("""
double_blocks.{0..18}.processor.proj_lora{1,2} 3072x3072
double_blocks.{0..18}.processor.qkv_lora{1,2} 9216x3072
""")

FLUX2 = shapes("""
double_blocks.{0,7}.{img,txt}_attn.qkv 18432x6144
double_blocks.{0,7}.{img,txt}_attn.proj 6144x6144
double_blocks.{0,7}.{img,txt}_mlp.0 36864x6144
double_blocks.{0,7}.{img,txt}_mlp.2 6144x18432
single_blocks.{0,47}.linear1 55296x6144
single_blocks.{0,47}.linear2 6144x24576
""")
FLUX2_ENDS = shapes("""
img_in 6144x128
txt_in 6144x15360
time_in.in_layer 6144x256
time_in.out_layer 6144x6144
final_layer.linear 128x6144
""")
FLUX2_MORE = shapes("""
guidance_in.in_layer 6144x256
guidance_in.out_layer 6144x6144
double_stream_modulation_{img,txt}.lin 36864x6144
single_stream_modulation.lin 18432x6144
""")
FLUX2_SWAPPED = shapes("final_layer.adaLN_modulation.1 12288x6144")
# klein 4B
KLEIN = shapes("""
double_blocks.{0,4}.{img,txt}_attn.qkv 9216x3072
double_blocks.{0,4}.{img,txt}_attn.proj 3072x3072
double_blocks.{0,4}.{img,txt}_mlp.0 18432x3072
double_blocks.{0,4}.{img,txt}_mlp.2 3072x9216
single_blocks.{0,19}.linear1 27648x3072
single_blocks.{0,19}.linear2 3072x12288
img_in 3072x128
txt_in 3072x7680
time_in.in_layer 3072x256
time_in.out_layer 3072x3072
final_layer.linear 128x3072
final_layer.adaLN_modulation.1 6144x3072
double_stream_modulation_{img,txt}.lin 18432x3072
single_stream_modulation.lin 9216x3072
""")
LYCORIS = shapes("""
transformer_blocks.{0,4}.attn.{to_q,to_k,to_v,to_out.0,to_add_out} 3072x3072
transformer_blocks.{0,4}.attn.add_{q,k,v}_proj 3072x3072
transformer_blocks.{0,4}.{ff,ff_context}.linear_in 18432x3072
transformer_blocks.{0,4}.{ff,ff_context}.linear_out 3072x9216
single_transformer_blocks.{0,19}.attn.to_qkv_mlp_proj 27648x3072
single_transformer_blocks.{0,19}.attn.to_out 3072x12288
""")

FLUX3_BLOCKS = """
{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks}.{0,4}.{q,k,v}_proj 3072x3072
{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks}.{0,4}.attn_out 3072x3072
{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks}.{0,4}.mlp_in 18432x3072
{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks}.{0,4}.mlp_out 3072x9216
single_blocks.{0,27}.{q,k,v}_proj 3072x3072
single_blocks.{0,27}.attn_out 3072x3072
single_blocks.{0,27}.mlp_in 18432x3072
single_blocks.{0,27}.mlp_out 3072x9216
"""
FLUX3 = shapes(FLUX3_BLOCKS)

NAMELESS = {
    r"(x_embedder|context_embedder|time_text_embed\..*|norm_out\.linear|proj_out)": (
        "it names the modules outside of the blocks without `transformer.`"
    )
}
LAST = {r"transformer\.(proj_out|norm_out\.linear)": "it throws away the alphas of the last layers"}
ENDINGS = {
    r"transformer\.norm_out\.linear": "it swaps the rank of the first factor with the rows of the second"
}
OWN = "adaptkit writes these names with ComfyUI's prefix and spelling of norms, and without a prefix diffusers' names"
UNSWAPPED = {
    r"transformer\.norm_out\.linear": "it leaves scale and shift in the order of the original"
}
SHARED = {
    r"transformer\.((double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"
    r"|time_guidance_embed\.guidance_embedder\..*)": "it warns of them and leaves them out"
}

CASES = {
    "_convert_kohya_flux_lora_to_diffusers": (
        Case(
            "Flux", "flux", "kohya",
            lambda: kohya(flux(ENDS, FINAL, MODULATION)) | kohya(shapes(CLIP_L), "lora_te1_"),
            nameless=NAMELESS, unscaled=LAST,
        ),
        Case("Flux", "flux", "kohya", sparse),
        Case(
            "Flux", "flux", "comfy",
            lambda: lora(flux(), "diffusion_model.", roles=KOHYA, alpha=ALPHAS)
            | lora(shapes(CLIP_L), "text_encoders.clip_l.transformer.", roles=KOHYA, alpha=ALPHAS),
            unwritten="it reads ComfyUI's names with lora_down and lora_up alone, which adaptkit writes as lora_A and lora_B",
        ),
        Case("Flux", "flux", "onetrainer", mixture),
        Case(
            "Flux", "flux", "diffusers",
            lambda: lora(ONETRAINER, "transformer.", roles=KOHYA),
            unwritten="the names are diffusers' own with kohya's factors",
        ),
    ),
    "_convert_xlabs_flux_lora_to_diffusers": (
        Case("Flux", "flux", "xlabs", lambda: lora(XLABS, roles=OLD)),
        Case("Flux", "flux", "xlabs", lambda: lora(XLABS, "diffusion_model.", roles=OLD)),
    ),
    "_convert_bfl_flux_control_lora_to_diffusers": (
        Case("Flux", "flux", "bare", control, wrong=ENDINGS, unwritten=OWN),
    ),
    "_convert_fal_kontext_lora_to_diffusers": (
        Case(
            "Flux", "flux", "comfy", lambda: lora(flux(FINAL, whole=True), "base_model.model.", rank=1),
            prefix=("diffusion_model.", "base_model.model."),
        ),
    ),
    "_convert_non_diffusers_flux2_lora_to_diffusers": (
        Case("Flux2", "flux2", "comfy", lambda: lora(FLUX2 | FLUX2_ENDS | FLUX2_MORE | FLUX2_SWAPPED, "diffusion_model."), wrong=UNSWAPPED),
    ),
    "_convert_kohya_flux2_lora_to_diffusers": (
        Case("Flux2", "flux2", "kohya", lambda: kohya(FLUX2 | FLUX2_ENDS | FLUX2_MORE), lost=SHARED),
    ),
    "_convert_non_diffusers_flux2_lokr_to_diffusers": (
        Case("Flux2", "flux2", "comfy", lambda: lokr(KLEIN, "diffusion_model."), wrong=UNSWAPPED),
    ),
    "_convert_lycoris_flux2_lokr_to_diffusers": (
        Case("Flux2", "flux2", "lycoris", lambda: lokr(LYCORIS, "lycoris_", "_")),
    ),
    "_convert_non_diffusers_flux3_lora_to_diffusers": (
        Case("Flux3", "flux3", "comfy", lambda: lora(FLUX3, "diffusion_model.")),
    ),
}  # fmt: skip
