"""Chroma: 8.9 G parameters, FLUX.1 (schnell) with one network for all modulations; T5-XXL.

Chroma Radiance has the same blocks, and draws pixels: patches of them come in, and small networks
made by its NeRF blocks go out. diffusers has no class for it.

Its blocks have FLUX.1's names and shapes: an adapter of blocks alone fits both. Source:
lodestone-rock's `flow` and diffusers' `ChromaTransformer2DModel`, mapped as in diffusers'
`convert_chroma_transformer_checkpoint_to_diffusers`; ComfyUI's `comfy/ldm/chroma_radiance` for
Radiance.
"""

from __future__ import annotations

from adaptkit.families._flux import SIZES as SIZES_OF_FLUX
from adaptkit.families._flux import double_attention, double_mlps, marks, single_block
from adaptkit.families._plain import matrices
from adaptkit.families._t5 import t5
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import Kind, ModelFamily, pair, scaled, sizes, transformer

DOUBLE, SINGLE = "double_blocks.{i:19}.", "single_blocks.{i:38}."
THEIRS, ALONE = "transformer_blocks.{i:19}.", "single_transformer_blocks.{i:38}."
# the network that replaces the modulations, with one name in both namings
GUIDANCE = "distilled_guidance_layer."

RADIANCE = (
    *matrices("img_in_patch", kernel=(16, 16)),
    *matrices("nerf_image_embedder.embedder.0", "nerf_blocks.{i:4}.param_generator"),
    pair(
        scaled("nerf_blocks.{i:4}.norm"),
        "nerf_blocks.{i:4}.norm",
        kind=Kind.NORM,
    ),
    *matrices("nerf_final_layer.linear"),
    *matrices("nerf_final_layer_conv.conv", kernel=(3, 3)),
    *(
        pair(scaled(f"{layer}.norm"), f"{layer}.norm", kind=Kind.NORM)
        for layer in ("nerf_final_layer", "nerf_final_layer_conv")
    ),
)

ROWS = (
    pair("img_in", "x_embedder"),
    pair("txt_in", "context_embedder"),
    *(pair(GUIDANCE + name, GUIDANCE + name) for name in ("in_proj", "out_proj")),
    pair(f"{GUIDANCE}layers.{{i:5}}.in_layer", f"{GUIDANCE}layers.{{i:5}}.linear_1"),
    pair(f"{GUIDANCE}layers.{{i:5}}.out_layer", f"{GUIDANCE}layers.{{i:5}}.linear_2"),
    pair(scaled(f"{GUIDANCE}norms.{{i:5}}"), f"{GUIDANCE}norms.{{i:5}}", kind=Kind.NORM),
    *double_attention(DOUBLE, THEIRS),
    *double_mlps(DOUBLE, THEIRS),
    *single_block(SINGLE, ALONE),
    pair("final_layer.linear", "proj_out"),
    *RADIANCE,
)

SIZES = sizes(f"{SIZES_OF_FLUX} 5120xd dx5120 5120x5120 16dxd", 3072)

FAMILY = ModelFamily(
    name="chroma",
    title="Chroma",
    kin=("img_in_patch", "nerf_"),
    components=(
        transformer("Chroma transformer", ROWS, sizes=SIZES),
        # sd-scripts keeps FLUX.1's number, OneTrainer counts from one
        t5("text_encoder", kohya=("te3", "te")),
    ),
    beside=(autoencoder("vae.", "first_stage_model."),),
    marks=marks(3072, mlp=4, single=7),
    architectures=("chroma",),
    modelspec="chroma",
    yields_to=("flux",),
)
