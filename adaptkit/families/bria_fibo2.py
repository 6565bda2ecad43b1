"""Bria FIBO 2: 44 layers of width 3584, a perceiver of the text, Z-Image's names for layers."""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

LAYERS = ("layers.{i:44}.", "noise_refiner.{i:2}.")
PERCEIVER = "perceiver.layers.{i:2}."

ROWS = (
    *matrices("x_embedder", "t_embedder.mlp.(0|2)"),
    *(
        made
        for layer in LAYERS
        for made in (
            *matrices(f"{layer}attention.to_(q|k|v|out.0)", f"{layer}feed_forward.w(1|2|3)"),
            *matrices(f"{layer}adaLN_modulation.0"),
            *norms(f"{layer}attention.norm_(q|k)", f"{layer}(attention|ffn)_norm(1|2)"),
        )
    ),
    # of five layers
    *matrices("layers.{i:44}.cross_attention.to_(q|k|v|out.0)"),
    *norms("layers.{i:44}.cross_attention.norm_(q|k)", "layers.{i:44}.cross_attn_norm(1|2)"),
    *parameters("layers.{i:44}.cross_attn_gate", "perceiver.latent_queries"),
    *matrices(f"{PERCEIVER}(self|cross)_attention.to_(q|k|v|out.0)", f"{PERCEIVER}ffn.w(1|2|3)"),
    *norms(f"{PERCEIVER}(self|cross)_attention.norm_(q|k)"),
    *norms(f"{PERCEIVER}(self_attn|cross_attn|ffn)_norm", "perceiver.norm_out"),
    *matrices("final_layer.linear", "final_layer.adaLN_modulation.1"),
)

FAMILY = ModelFamily(
    name="bria-fibo2",
    title="Bria FIBO 2",
    components=(
        transformer(
            "Bria FIBO 2 transformer",
            ROWS,
            sizes=sizes("dxd 4dx256 dx256 dx7680 9536xd dx9536", 3584),
        ),
    ),
    marks=(
        Mark("transformer", "attention.to_q", columns=3584),
        Mark("transformer", "feed_forward.w1", columns=3584),
        Mark("transformer", "feed_forward.w2", rows=3584),
    ),
    architectures=("bria-fibo-2", "bria-fibo2", "fibo-2"),
    modelspec="bria-fibo-2",
)
