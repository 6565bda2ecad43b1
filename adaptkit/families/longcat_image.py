"""LongCat-Image (and Dev, Edit): 6.3 G parameters, 10 double and 20 single blocks of FLUX.1's.

It has neither pooled text nor guidance, and its text comes from Qwen2.5-VL. An adapter of some of
its blocks fits FLUX.1 too. Source: diffusers' `LongCatImageTransformer2DModel`; ComfyUI loads it
into its FLUX.1, with the names of that.
"""

from __future__ import annotations

from dataclasses import replace

from adaptkit.families._flux import (
    SIZES,
    double_attention,
    double_mlps,
    embedder,
    marks,
    single_block,
)
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import ModelFamily, pair, sizes, swapped, transformer

DOUBLE, SINGLE = "double_blocks.{i:10}.", "single_blocks.{i:20}."
THEIRS, ALONE = "transformer_blocks.{i:10}.", "single_transformer_blocks.{i:20}."

ROWS = (
    pair("img_in", "x_embedder"),
    pair("txt_in", "context_embedder"),
    *embedder("time_in", "time_embed.timestep_embedder"),
    *double_attention(DOUBLE, THEIRS, plain=True),
    pair(f"{DOUBLE}img_mod.lin", f"{THEIRS}norm1.linear"),
    pair(f"{DOUBLE}txt_mod.lin", f"{THEIRS}norm1_context.linear"),
    *double_mlps(DOUBLE, THEIRS),
    *single_block(SINGLE, ALONE, plain=True),
    pair(f"{SINGLE}modulation.lin", f"{ALONE}norm.linear"),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

TRANSFORMER = transformer("LongCat-Image transformer", ROWS, sizes=sizes(f"{SIZES} dx3584", 3072))

FAMILY = ModelFamily(
    name="longcat-image",
    title="LongCat-Image",
    components=(
        replace(
            TRANSFORMER,
            checkpoints={**TRANSFORMER.checkpoints, "scaled": TRANSFORMER.checkpoints["native"]},
        ),
    ),
    beside=(autoencoder("vae.", "first_stage_model."),),
    marks=marks(3072, mlp=4, single=7),
    architectures=("longcat-image", "longcat_image", "longcat"),
    modelspec="longcat-image",
    yields_to=("flux",),
)
