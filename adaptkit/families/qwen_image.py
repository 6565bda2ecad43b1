"""Qwen-Image (and Edit, Layered): 20 G parameters, 60 double blocks, under diffusers' names."""

from __future__ import annotations

from adaptkit.families.contract import Kind, Mark, ModelFamily, row, sizes, transformer

BLOCK = "transformer_blocks.{i:60}."

ROWS = (
    row("img_in"),
    row("txt_in"),
    row("txt_norm", kind=Kind.NORM),
    row("time_text_embed.timestep_embedder.linear_1"),
    row("time_text_embed.timestep_embedder.linear_2"),
    row("time_text_embed.addition_t_embedding", kind=Kind.EMBEDDING),  # Layered only
    *(row(f"{BLOCK}attn.to_{name}") for name in ("q", "k", "v", "out.0", "add_out")),
    *(row(f"{BLOCK}attn.add_{name}_proj") for name in "qkv"),
    *(row(f"{BLOCK}attn.norm_{name}", kind=Kind.NORM) for name in ("q", "k", "added_q", "added_k")),
    *(
        row(f"{BLOCK}{side}_{name}")
        for side in ("img", "txt")
        for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
    ),
    row("norm_out.linear"),
    row("proj_out"),
)

SIZES = sizes("dxd 2dxd 4dxd 6dxd dx4d dx3584", 3072)

FAMILY = ModelFamily(
    name="qwen-image",
    title="Qwen-Image",
    components=(transformer("Qwen-Image transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn.to_q", columns=3072),
        Mark("transformer", "attn.add_q_proj", columns=3072),
        Mark("transformer", "norm_out.linear", columns=3072),
        Mark("transformer", "proj_out", rows=64),
    ),
    architectures=("qwen-image", "qwen_image"),
    modelspec="Qwen-Image",
    yields_to=("flux",),  # attention of the first 19 blocks alone; a full file has 60
)
