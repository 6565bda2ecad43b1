"""CogView4: 6 G parameters, 28 blocks of width 4096 with one modulation each; GLM-4 9B."""

from __future__ import annotations

from adaptkit.families._plain import matrices
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "transformer_blocks.{i:28}."

ROWS = (
    *matrices("patch_embed.(proj|text_proj)"),
    *matrices("time_condition_embed.(timestep|condition)_embedder.linear_(1|2)"),
    *matrices(
        f"{BLOCK}norm1.linear", f"{BLOCK}attn1.to_(q|k|v|out.0)", f"{BLOCK}ff.net.(0.proj|2)"
    ),
    *matrices("norm_out.linear", "proj_out"),
)

FAMILY = ModelFamily(
    name="cogview4",
    title="CogView4",
    components=(
        transformer(
            "CogView4 transformer",
            ROWS,
            sizes=sizes("dxd 4dxd dx4d 12dx512 2dx512 512xd 512x512 512x1536", 4096),
        ),
    ),
    marks=(
        Mark("transformer", "attn1.to_q", columns=4096),
        Mark("transformer", "norm1.linear", columns=512),
        Mark("transformer", "ff.net.2", rows=4096),
    ),
    architectures=("cogview4", "cogview-4"),
    modelspec="CogView4",
    yields_to=("ltx2", "ltx-13b"),  # if a few modules show no second attention
)
