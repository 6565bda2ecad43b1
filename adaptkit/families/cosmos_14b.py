"""Cosmos-Predict 2 and 2.5, 14B: video, 36 blocks, 5120 wide; and Cosmos 1 7B, 28 blocks of 4096.

Cosmos 1 is read under diffusers' names. Source: diffusers' `CosmosTransformer3DModel` and its
converter.
"""

from __future__ import annotations

from adaptkit.families._cosmos import PREFIXES, cosmos_rows
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

WIDTHS = (4096, 5120)
SIZES = sizes("dxd 3dxd 4dxd dx4d dx1024 dx1152 2048x1152 1024x100352", *WIDTHS)

FAMILY = ModelFamily(
    name="cosmos-14b",
    title="Cosmos-Predict 14B",
    components=(
        transformer(
            "Cosmos 14B transformer", cosmos_rows(36), sizes=SIZES, native_prefixes=PREFIXES
        ),
    ),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=WIDTHS),
        Mark("transformer", "cross_attn.k_proj", columns=1024),
    ),
    architectures=("cosmos-predict2-14b", "cosmos-14b"),
    modelspec="cosmos-predict2-14b",
    twins=((".self_attn.", ".cross_attn."),),  # as in LTX-Video
    # self-attention alone in diffusers' names fits them too
    yields_to=("ltx2", "ltx-13b"),
)
