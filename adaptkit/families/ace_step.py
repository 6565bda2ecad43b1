"""ACE-Step 1.5: music, 24 layers of width 2048 with 8 heads for keys and values; Qwen3 0.6B.

Trainers of the original save PEFT files of its decoder. Source: diffusers'
`_convert_non_diffusers_ace_step_lora_to_diffusers` and `AceStepTransformer1DModel`.
"""

from __future__ import annotations

from dataclasses import replace

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import (
    NATIVE_PREFIXES,
    Kind,
    Mark,
    ModelFamily,
    pair,
    sizes,
    transformer,
)

LAYER = "layers.{i:32}."
WORDS = (
    ("_attn.to_q", "_attn.q_proj"),
    ("_attn.to_k", "_attn.k_proj"),
    ("_attn.to_v", "_attn.v_proj"),
    ("_attn.to_out.0", "_attn.o_proj"),
    ("_attn.norm_q", "_attn.q_norm"),
    ("_attn.norm_k", "_attn.k_norm"),
    ("proj_in_conv", "proj_in.1"),
)

ROWS = (
    *matrices("proj_in_conv", words=WORDS, kernel=(2,)),
    pair("proj_out.1", "proj_out_conv", kind=Kind.EMBEDDING),  # a transposed convolution
    *matrices("(time_embed|time_embed_r).(linear_1|linear_2|time_proj)", "condition_embedder"),
    *matrices(f"{LAYER}(self|cross)_attn.to_(q|k|v|out.0)", words=WORDS),
    *matrices(f"{LAYER}mlp.(gate|up|down)_proj"),
    *norms(f"{LAYER}(self|cross)_attn.norm_(q|k)", words=WORDS),
    *norms(f"{LAYER}(self_attn_norm|cross_attn_norm|mlp_norm)", "norm_out"),
    *parameters(f"{LAYER}scale_shift_table", "scale_shift_table"),
)

# the second width is that of the XL models, with a condition 2048 wide
SIZES = sizes("dxd 6dxd 1024xd 3dxd dx3d", 2048) | sizes(
    "4096x2560 1024x2560 2560x4096 9728x2560 2560x9728 2560x2560 15360x2560 2560x2048"
)

TRANSFORMER = transformer(
    "ACE-Step decoder",
    ROWS,
    sizes=SIZES,
    native_prefixes=(
        "decoder.",
        *(f"{prefix}decoder." for prefix in NATIVE_PREFIXES[:3]),
        *NATIVE_PREFIXES,
    ),
)
# PEFT files are the original's
STYLES = ("kohya", "comfy", "peft", "bare")

FAMILY = ModelFamily(
    name="ace-step",
    title="ACE-Step 1.5",
    components=(replace(TRANSFORMER, namings=dict.fromkeys(STYLES, "native")),),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=(2048, 2560)),
        Mark("transformer", "self_attn.k_proj", rows=1024),
        Mark("transformer", "mlp.down_proj", rows=(2048, 2560)),
    ),
    architectures=("ace-step", "ace_step", "acestep"),
    modelspec="ace-step-1.5",
    # language models have self-attention alone
    twins=((".self_attn.", ".cross_attn."),),
)
