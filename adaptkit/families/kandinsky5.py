"""Kandinsky 5: image (2560 wide) and video (Lite: 1792, Pro: 4096), the same names everywhere.

Text encoders: Qwen2.5-VL 7B and CLIP-L.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

TEXT, VISUAL = "text_transformer_blocks.{i:4}.", "visual_transformer_blocks.{i:60}."
ATTENTIONS = (f"{TEXT}self_attention.", f"{VISUAL}self_attention.", f"{VISUAL}cross_attention.")

ROWS = (
    *matrices("time_embeddings.(in|out)_layer"),
    *matrices("(text_embeddings|pooled_text_embeddings|visual_embeddings).in_layer"),
    *norms("(text_embeddings|pooled_text_embeddings).norm"),
    *matrices(f"{TEXT}text_modulation.out_layer", f"{VISUAL}visual_modulation.out_layer"),
    *(
        made
        for attention in ATTENTIONS
        for made in (
            *matrices(f"{attention}(to_query|to_key|to_value|out_layer)"),
            *norms(f"{attention}(query|key)_norm"),
        )
    ),
    *(made for b in (TEXT, VISUAL) for made in matrices(f"{b}feed_forward.(in|out)_layer")),
    *matrices("out_layer.modulation.out_layer", "out_layer.out_layer"),
)

WIDTHS = (1792, 2048, 2560, 4096)
SIZES = sizes(
    "dxd 4dxd dx4d 5120xd dx5120 dx3584 6dx512 9dx512 2dx512 6dx1024 9dx1024", *WIDTHS
) | sizes("512x512 1024x1024 512x768 1024x768 8192x1024 512x1792 512x2048 512x2560 1024x4096")

FAMILY = ModelFamily(
    name="kandinsky5",
    title="Kandinsky 5",
    components=(transformer("Kandinsky 5 transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "self_attention.to_query", columns=WIDTHS),
        Mark("transformer", "cross_attention.to_key", columns=WIDTHS),
        Mark("transformer", "feed_forward.out_layer", rows=WIDTHS),
    ),
    architectures=("kandinsky-5", "kandinsky5", "kandinsky_5"),
    modelspec="kandinsky-5",
)
