"""FLUX.1 (dev, schnell, Kontext, Fill, Control): 12 G parameters, 19 double and 38 single blocks; CLIP-L and T5-XXL."""

from __future__ import annotations

from adaptkit.families._clip import clip_l
from adaptkit.families._family import Mark, ModelFamily, pair, split, swapped, transformer
from adaptkit.families._flux import double_attention, single_norms
from adaptkit.families._t5 import t5

DOUBLE, SINGLE = "double_blocks.{i:19}.", "single_blocks.{i:38}."
THEIRS, ALONE = "transformer_blocks.{i:19}.", "single_transformer_blocks.{i:38}."

ROWS = (
    pair("img_in", "x_embedder"),
    pair("txt_in", "context_embedder"),
    *(
        pair(f"{name}_in.{layer}_layer", f"time_text_embed.{theirs}.linear_{n}")
        for name, theirs in (
            ("time", "timestep_embedder"),
            ("vector", "text_embedder"),
            ("guidance", "guidance_embedder"),
        )
        for layer, n in (("in", 1), ("out", 2))
    ),
    *double_attention(DOUBLE, THEIRS),
    pair(f"{DOUBLE}img_mod.lin", f"{THEIRS}norm1.linear"),
    pair(f"{DOUBLE}txt_mod.lin", f"{THEIRS}norm1_context.linear"),
    pair(f"{DOUBLE}img_mlp.0", f"{THEIRS}ff.net.0.proj"),
    pair(f"{DOUBLE}img_mlp.2", f"{THEIRS}ff.net.2"),
    pair(f"{DOUBLE}txt_mlp.0", f"{THEIRS}ff_context.net.0.proj"),
    pair(f"{DOUBLE}txt_mlp.2", f"{THEIRS}ff_context.net.2"),
    pair(
        f"{SINGLE}linear1",
        split(ALONE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", ratio=(1, 1, 1, 4)),
        omi=split(f"{SINGLE}linear1.", "0", "1", "2", "3", ratio=(1, 1, 1, 4)),
    ),
    pair(f"{SINGLE}linear2", f"{ALONE}proj_out"),
    pair(f"{SINGLE}modulation.lin", f"{ALONE}norm.linear"),
    *single_norms(SINGLE, ALONE),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

FAMILY = ModelFamily(
    name="flux",
    title="FLUX.1",
    components=(
        transformer("FLUX.1 transformer", ROWS),
        clip_l(),
        t5("text_encoder_2", kohya=("te3", "te2")),
    ),
    marks=(
        Mark("transformer", "img_attn.qkv", columns=3072),
        Mark("transformer", "img_mlp.0", rows=12288),
        Mark("transformer", "linear1", rows=21504),
    ),
    architectures=("flux-1", "flux.1", "flux1"),
    modelspec="flux-1-dev",
)
