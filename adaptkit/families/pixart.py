"""PixArt-α and Σ: 0.6 G parameters, 28 blocks of width 1152; T5-XXL.

diffusers' names; the original joins q, k and v of self-attention, k and v of cross-attention.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, parameters
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "transformer_blocks.{i:28}."
EMBEDDERS = "adaln_single.emb.(timestep|resolution|aspect_ratio)_embedder.linear_(1|2)"

ROWS = (
    *matrices("pos_embed.proj", kernel=(2, 2)),
    *matrices("caption_projection.linear_(1|2)", EMBEDDERS, "adaln_single.linear"),
    *matrices(f"{BLOCK}attn(1|2).to_(q|k|v|out.0)", f"{BLOCK}ff.net.(0.proj|2)"),
    *parameters(f"{BLOCK}scale_shift_table", "scale_shift_table"),
    *matrices("proj_out"),
)

FAMILY = ModelFamily(
    name="pixart",
    title="PixArt",
    components=(
        transformer(
            "PixArt transformer", ROWS, sizes=sizes("dxd 4dxd dx4d 6dxd dx4096 384x384", 1152)
        ),
    ),
    marks=(
        Mark("transformer", "attn1.to_q", columns=1152),
        Mark("transformer", "attn2.to_k", columns=1152),
        Mark("transformer", "ff.net.0.proj", rows=4608),
    ),
    architectures=("pixart",),
    modelspec="pixart",
    twins=((".attn1.", ".attn2."),),  # as in LTX-Video
)
