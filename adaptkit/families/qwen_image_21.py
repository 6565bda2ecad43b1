"""Qwen-Image 2.1: 7 G parameters, 32 single-stream blocks of width 4096, under diffusers' names.

ComfyUI's single file joins the MLP's gate and value. Source: diffusers'
`convert_qwen_image21_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Mark, ModelFamily, pair, sizes, split, transformer

BLOCK = "transformer_blocks.{i:32}."

ROWS = (
    *matrices("img_in", "txt_in.(in_layer|out_layer)", "modulation.1"),
    *matrices("time_text_embed.timestep_embedder.linear_(1|2)"),
    *norms("txt_in.text_norm"),
    *matrices(f"{BLOCK}attn.to_(q|k|v|out.0)"),
    *norms(f"{BLOCK}attn.norm_(q|k)"),
    pair(f"{BLOCK}img_mlp.gate_up", split(f"{BLOCK}img_mlp.", "gate_layer", "proj")),
    *matrices(f"{BLOCK}img_mlp.out"),
    *matrices("norm_out.linear", "proj_out"),
)

FAMILY = ModelFamily(
    name="qwen-image-21",
    title="Qwen-Image 2.1",
    components=(
        transformer(
            "Qwen-Image 2.1 transformer",
            ROWS,
            sizes=sizes("dxd 4dxd 6dxd dx3d", 4096),
            kohya="diffusers",
        ),
    ),
    marks=(
        Mark("transformer", "attn.to_q", columns=4096),
        Mark("transformer", "img_mlp.out", rows=4096),
    ),
    architectures=("qwen-image-2.1", "qwen_image_2.1", "qwen_image_21", "qwen-image-21"),
    modelspec="Qwen-Image-2.1",
)
