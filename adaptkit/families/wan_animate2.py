"""Wan Animate 2: 40 blocks of width 5120 with Wan's names for layers, wrapped in the original.

Source: diffusers' `convert_wan_animate_2_transformer_to_diffusers`.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "blocks.{i:40}."
WORDS = (
    (BLOCK, f"{BLOCK}block."),
    ("_attn.to_q", "_attn.q"),
    ("_attn.to_k", "_attn.k"),
    ("_attn.to_v", "_attn.v"),
    ("_attn.to_out.0", "_attn.o"),
    ("_attn.add_k_proj", "_attn.k_img"),
    ("_attn.add_v_proj", "_attn.v_img"),
    ("_attn.norm_added_k", "_attn.norm_k_img"),
)

ROWS = (
    *matrices("patch_embedding", kernel=(1, 2, 2)),
    *matrices("(text|time)_embedding.(0|2)", "time_projection.1", "img_emb.proj.(1|3)"),
    *norms("img_emb.proj.(0|4)"),
    *matrices(f"{BLOCK}(self|cross)_attn.to_(q|k|v|out.0)", words=WORDS),
    *matrices(f"{BLOCK}cross_attn.add_(k|v)_proj", f"{BLOCK}ffn.(0|2)", words=WORDS),
    *norms(f"{BLOCK}(self|cross)_attn.norm_(q|k)", words=WORDS),
    *norms(f"{BLOCK}cross_attn.norm_added_k", f"{BLOCK}norm3", words=WORDS),
    *parameters(f"{BLOCK}modulation", words=WORDS),
    *parameters("head.modulation"),
    *matrices("head.head"),
)

FAMILY = ModelFamily(
    name="wan-animate2",
    title="Wan Animate 2",
    components=(
        transformer(
            "Wan Animate 2 transformer",
            ROWS,
            sizes=sizes("dxd 6dxd dx4096 dx1280 13824xd dx13824 1280x1280", 5120),
        ),
    ),
    marks=(
        Mark("transformer", "self_attn.q", columns=5120),
        Mark("transformer", "cross_attn.k", columns=5120),
    ),
    architectures=("wan-animate-2", "wan_animate_2"),
    modelspec="wan-animate-2",
)
