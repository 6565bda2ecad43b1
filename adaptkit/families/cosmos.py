"""Cosmos-Predict 2 and 2.5: video, 2B (28 blocks, 2048 wide) and 14B (36, 5120); T5-11B or Qwen.

Anima has the transformer of 2B. Source: diffusers' `CosmosTransformer3DModel` and its converter.
"""

from __future__ import annotations

from adaptkit.families._cosmos import PREFIXES, transformer_rows
from adaptkit.families._plain import matrices, parameters
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

WIDTHS = (2048, 4096, 5120)  # 4096: Cosmos 1 7B, in diffusers' names

ROWS = (
    *transformer_rows(36),
    *matrices("crossattn_proj.0", "img_context_proj.0"),  # 2.5, Transfer
    *parameters("learnable_pos_embed.pos_emb_(t|h|w)"),  # Cosmos 1
)

SIZES = sizes("dxd 3dxd 4dxd dx4d dx1024 2048x1152 1024x100352", *WIDTHS)

FAMILY = ModelFamily(
    name="cosmos",
    title="Cosmos-Predict",
    components=(transformer("Cosmos transformer", ROWS, sizes=SIZES, native_prefixes=PREFIXES),),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=WIDTHS),
        Mark("transformer", "cross_attn.k_proj", columns=1024),
    ),
    architectures=("cosmos",),
    modelspec="cosmos-predict2",
    twins=((".self_attn.", ".cross_attn."),),  # as in LTX-Video
    # 2B fits both; self-attention alone in diffusers' names fits LTX too
    yields_to=("anima", "ltx", "ltx2", "ltx-13b"),
)
