"""Ideogram 4: 34 layers of width 4608.

Source: the original checkpoint (musubi-tuner) and diffusers' `Ideogram4Transformer2DModel`. No
converter exists: names and shapes are matched, and the order of q, k, v is that of diffusers'
adapters.
"""

from __future__ import annotations

from adaptkit.families.contract import Kind, Mark, ModelFamily, pair, row, sizes, split, transformer

LAYER = "layers.{i:34}."
ENDS = ("input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj")

ROWS = (
    *(row(name) for name in ENDS),
    row("llm_cond_norm", kind=Kind.NORM),
    row("embed_image_indicator", kind=Kind.EMBEDDING),
    pair(f"{LAYER}attention.qkv", split(f"{LAYER}attention.", "to_q", "to_k", "to_v")),
    pair(f"{LAYER}attention.o", f"{LAYER}attention.to_out.0"),
    *(
        row(f"{LAYER}{name}")
        for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
    ),
    *(row(f"{LAYER}attention.norm_{letter}", kind=Kind.NORM) for letter in "qk"),
    *(
        row(f"{LAYER}{name}_norm{n}", kind=Kind.NORM)
        for name in ("attention", "ffn")
        for n in (1, 2)
    ),
    row("final_layer.linear"),
    row("final_layer.adaln_modulation"),
)

SIZES = sizes("dxd 3dxd 12288xd dx12288 dx53248 dx512 512xd 18432x512", 4608)

FAMILY = ModelFamily(
    name="ideogram4",
    title="Ideogram 4",
    components=(transformer("Ideogram 4 transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attention.qkv", columns=4608),
        Mark("transformer", "feed_forward.w1", columns=4608),
        Mark("transformer", "feed_forward.w2", rows=4608),
    ),
    architectures=("ideogram-4", "ideogram4", "ideogram_4"),
    modelspec="Ideogram-4",
)
