"""Cosmos-Predict 2 and 2.5, 2B: video, 28 blocks, 2048 wide; T5-11B or Qwen2.5-VL.

Anima has the same transformer. Source: diffusers' `CosmosTransformer3DModel` and its converter.
"""

from __future__ import annotations

from adaptkit.families._cosmos import PREFIXES, cosmos_rows
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

SIZES = sizes("dxd 3dxd 4dxd dx4d dx1024 dx1152 1024x100352", 2048)

FAMILY = ModelFamily(
    name="cosmos",
    title="Cosmos-Predict 2B",
    components=(
        transformer("Cosmos transformer", cosmos_rows(28), sizes=SIZES, native_prefixes=PREFIXES),
    ),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=2048),
        Mark("transformer", "cross_attn.k_proj", columns=1024),
    ),
    architectures=("cosmos",),
    modelspec="cosmos-predict2",
    twins=((".self_attn.", ".cross_attn."),),  # as in LTX-Video
    # blocks fit both; self-attention alone in diffusers' names fits LTX too
    yields_to=("anima", "ltx"),
)
