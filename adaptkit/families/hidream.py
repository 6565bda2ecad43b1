"""HiDream-I1 and E1: 17 G parameters, 16 double and 32 single blocks with 4 experts, 2560 wide.

Text encoders: CLIP-L, CLIP-G, T5-XXL and Llama 3.1 8B. The names are the same everywhere.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Kind, Mark, ModelFamily, row, sizes, transformer

DOUBLE, SINGLE = "double_stream_blocks.{i:16}.block.", "single_stream_blocks.{i:32}.block."

ROWS = (
    *matrices(
        "t_embedder.timestep_embedder.linear_(1|2)", "p_embedder.pooled_embedder.linear_(1|2)"
    ),
    *matrices("x_embedder.proj", "caption_projection.{i:49}.linear"),
    *matrices(f"{DOUBLE}attn1.to_(q|k|v|out)(|_t)", f"{SINGLE}attn1.to_(q|k|v|out)"),
    *norms(f"{DOUBLE}attn1.(q|k)_rms_norm(|_t)", f"{SINGLE}attn1.(q|k)_rms_norm"),
    *(
        made
        for block in (DOUBLE, SINGLE)
        for made in (
            *matrices(f"{block}adaLN_modulation.1", f"{block}ff_i.shared_experts.w(1|2|3)"),
            *matrices(f"{block}ff_i.experts.{{j:4}}.w(1|2|3)"),
            row(f"{block}ff_i.gate", kind=Kind.EMBEDDING),  # chooses experts; no layer to adapt
        )
    ),
    *matrices(f"{DOUBLE}ff_t.w(1|2|3)"),
    *matrices("final_layer.linear", "final_layer.adaLN_modulation.1"),
)

SIZES = sizes("dxd 2dxd 6dxd 12dxd dx2048 dx4096 3584xd dx3584 6912xd dx6912", 2560)

FAMILY = ModelFamily(
    name="hidream",
    title="HiDream-I1",
    components=(transformer("HiDream transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn1.to_q", columns=2560),
        Mark("transformer", "shared_experts.w1", rows=3584),
        Mark("transformer", "ff_t.w1", rows=6912),
    ),
    architectures=("hidream",),
    modelspec="hidream-i1",
)
