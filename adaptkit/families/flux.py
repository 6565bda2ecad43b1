"""FLUX.1 (dev, schnell, Kontext, Fill, Control, Redux): 12 G parameters; CLIP-L and T5-XXL.

Fill and Control differ in the width of what comes in, Redux is a part beside the transformer.
"""

from __future__ import annotations

from adaptkit.families._clip import clip_l
from adaptkit.families._flux import (
    SHARES,
    SIZES,
    double_attention,
    double_mlps,
    embedder,
    marks,
    single_block,
)
from adaptkit.families._plain import matrices
from adaptkit.families._t5 import t5
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import (
    Component,
    ModelFamily,
    Row,
    named,
    pair,
    sizes,
    split,
    swapped,
    transformer,
)

DOUBLE, SINGLE = "double_blocks.{i:19}.", "single_blocks.{i:38}."
THEIRS, ALONE = "transformer_blocks.{i:19}.", "single_transformer_blocks.{i:38}."

PUBLIC = (
    pair("img_in", "x_embedder"),
    pair("txt_in", "context_embedder"),
    *embedder("time_in", "time_text_embed.timestep_embedder"),
    *embedder("vector_in", "time_text_embed.text_embedder"),
    *embedder("guidance_in", "time_text_embed.guidance_embedder"),  # not in schnell
    *double_attention(DOUBLE, THEIRS),
    pair(f"{DOUBLE}img_mod.lin", f"{THEIRS}norm1.linear"),
    pair(f"{DOUBLE}txt_mod.lin", f"{THEIRS}norm1_context.linear"),
    *double_mlps(DOUBLE, THEIRS),
    *single_block(SINGLE, ALONE),
    pair(f"{SINGLE}modulation.lin", f"{ALONE}norm.linear"),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

# names in formats that exist for this family alone
OMI = {
    f"{SINGLE}linear1": split(f"{SINGLE}linear1.", "0", "1", "2", "3", ratio=SHARES),
    **{
        f"{DOUBLE}{side}_attn.qkv": split(f"{DOUBLE}{side}_attn.qkv.", "0", "1", "2")
        for side in ("img", "txt")
    },
}
XLABS = {
    f"{DOUBLE}{side}_attn.{name}": (named(f"{DOUBLE}processor.{name}_lora{n}"),)
    for n, side in ((1, "img"), (2, "txt"))
    for name in ("qkv", "proj")
}
# DiffSynth-Studio's own model, which has the rows of the original one
DIFFSYNTH = {
    **{
        f"{DOUBLE}{side}_{ours}": (named(f"blocks.{{i:19}}.{theirs.format(letter)}"),)
        for side, letter in (("img", "a"), ("txt", "b"))
        for ours, theirs in (
            ("attn.qkv", "attn.{}_to_qkv"),
            ("attn.proj", "attn.{}_to_out"),
            ("mlp.0", "ff_{}.0"),
            ("mlp.2", "ff_{}.2"),
            ("mod.lin", "norm1_{}.linear"),
        )
    },
    f"{SINGLE}linear1": (named(f"{SINGLE}to_qkv_mlp"),),
    f"{SINGLE}linear2": (named(f"{SINGLE}proj_out"),),
    f"{SINGLE}modulation.lin": (named(f"{SINGLE}norm.linear"),),
    "final_layer.linear": (named("final_proj_out"),),
    "final_layer.adaLN_modulation.1": (named("final_norm_out.linear"),),
}


def _with_others(public: Row) -> Row:
    names = {
        "omi": OMI.get(public.target),
        "xlabs": XLABS.get(public.target),
        "diffsynth": DIFFSYNTH.get(public.target),
    }
    return public._replace(
        names={**public.names, **{naming: name for naming, name in names.items() if name}}
    )


ROWS = tuple(_with_others(public) for public in PUBLIC)

# a file and a pipeline of its own; nothing loads adapters of it
REDUX = Component(
    name="image_embedder",
    title="Redux",
    rows=tuple(matrices("redux_up", "redux_down")),
    checkpoints={"diffusers": ("", "image_embedder.")},
    sizes=sizes("12288x1152 4096x12288"),
)

FAMILY = ModelFamily(
    name="flux",
    title="FLUX.1",
    components=(
        transformer("FLUX.1 transformer", ROWS, sizes=sizes(f"{SIZES} dx384", 3072)),
        clip_l(),
        # sd-scripts numbers T5 as in SD3; OneTrainer by its place, which is all that InvokeAI reads
        t5("text_encoder_2", kohya=("te3", "te2"), onetrainer=("te2", "te3")),
        REDUX,
    ),
    beside=(autoencoder("vae.", "first_stage_model."),),
    marks=marks(3072, mlp=4, single=7),
    architectures=("flux-1", "flux.1", "flux1", "flux_1", "flux_kontext", "flux-kontext"),
    modelspec="flux-1-dev",
    base_version="flux1",
)
