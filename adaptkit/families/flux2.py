"""FLUX.2: dev (32 G parameters, 8 double and 48 single blocks), klein 9B (8, 24), klein 4B (5, 20).

All blocks share their modulations, and diffusers keeps the layers of single blocks fused. Source:
black-forest-labs `flux2/model.py` and diffusers' `Flux2Transformer2DModel`, mapped as in diffusers'
`convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from adaptkit.families._flux import double_attention, double_mlps, embedder, marks, single_norms
from adaptkit.families.contract import (
    ModelFamily,
    Row,
    named,
    pair,
    sizes,
    swapped,
    transformer,
)

DOUBLE, SINGLE = "double_blocks.{i:8}.", "single_blocks.{i:48}."
THEIRS, ALONE = "transformer_blocks.{i:8}.", "single_transformer_blocks.{i:48}."

OUT = f"{DOUBLE}img_attn.proj"


def _with_mflux(public: Row) -> Row:
    """A row with the name that mflux's trainer writes, whose model has no list there."""
    if public.target != OUT:
        return public
    return public._replace(names={**public.names, "mflux": (named(f"{THEIRS}attn.to_out"),)})


ROWS = (
    pair("img_in", "x_embedder"),
    pair("txt_in", "context_embedder"),
    *embedder("time_in", "time_guidance_embed.timestep_embedder"),
    *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),  # dev only
    *(
        pair(f"{name}.lin", f"{name}.linear")
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
    *map(_with_mflux, double_attention(DOUBLE, THEIRS)),
    *double_mlps(DOUBLE, THEIRS, "linear_in", "linear_out"),
    pair(f"{SINGLE}linear1", f"{ALONE}attn.to_qkv_mlp_proj"),
    pair(f"{SINGLE}linear2", f"{ALONE}attn.to_out"),
    *single_norms(SINGLE, ALONE),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

# klein 4B, klein 9B, dev; Mistral Small 3 and Qwen 3 come in three layers
SIZES = sizes("dxd 2dxd 3dxd 6dxd 9dxd dx3d dx4d", 3072, 4096, 6144) | sizes(
    "3072x7680 4096x12288 6144x15360"
)

FAMILY = ModelFamily(
    name="flux2",
    title="FLUX.2",
    components=(transformer("FLUX.2 transformer", ROWS, sizes=SIZES),),
    # klein 4B is as wide as FLUX.1, but its gated MLPs have 6 rows per width instead of 4
    marks=marks(3072, 4096, 6144, mlp=6, single=9),
    architectures=("flux-2", "flux.2", "flux2", "flux_2"),
    modelspec="Flux.2-dev",
    yields_to=("flux",),
)
