"""PRX: 1.2 G parameters, 16 blocks of width 1792 with joint projections; T5-Gemma."""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "blocks.{i:16}."

ROWS = (
    *matrices("img_in", "img_in.(0|1)", "txt_in", "time_in.(in|out)_layer"),
    *matrices("resolution_embedder.mlp.(in|out)_layer"),
    *matrices(f"{BLOCK}attention.(img_qkv_proj|txt_kv_proj|to_out.0)"),
    *norms(f"{BLOCK}attention.(norm_q|norm_k|norm_added_k)"),
    *matrices(f"{BLOCK}(gate_proj|up_proj|down_proj|modulation.lin)"),
    *matrices("final_layer.linear", "final_layer.adaLN_modulation.1"),
)

FAMILY = ModelFamily(
    name="prx",
    title="PRX",
    components=(
        transformer(
            "PRX transformer",
            ROWS,
            sizes=sizes("dxd 2dxd 3dxd 6dxd dx2304 6272xd dx6272 768xd dx768", 1792),
        ),
    ),
    marks=(
        Mark("transformer", "attention.img_qkv_proj", columns=1792),
        Mark("transformer", "down_proj", rows=1792),
    ),
    architectures=("prx",),
    modelspec="prx",
)
