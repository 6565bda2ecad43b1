"""ERNIE-Image: 36 layers of width 4096, under the same names everywhere; Mistral 3.

Source: diffusers' `ErnieImageTransformer2DModel`, whose converter only takes a prefix away. Its
defaults are of a smaller model, of 24 layers of width 3072; mflux and DiffSynth-Studio give the
sizes of the one that is published.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Mark, ModelFamily, row, sizes, transformer

LAYER = "layers.{i:36}."

ROWS = (
    *matrices("x_embedder.proj", kernel=(1, 1)),
    *matrices("text_proj", "time_embedding.linear_(1|2)"),
    row("adaLN_modulation.1", native="adaLN_modulation.1", mflux="adaln_modulation"),
    *matrices(f"{LAYER}self_attention.to_(q|k|v|out.0)"),
    *matrices(f"{LAYER}mlp.(gate_proj|up_proj|linear_fc2)"),
    *norms(f"{LAYER}self_attention.norm_(q|k)", f"{LAYER}adaLN_(sa|mlp)_ln"),
    *matrices("final_norm.linear", "final_linear"),
)

FAMILY = ModelFamily(
    name="ernie-image",
    title="ERNIE-Image",
    components=(
        transformer(
            "ERNIE-Image transformer",
            ROWS,
            sizes=sizes("dxd 2dxd 6dxd dx2560 8192xd dx8192", 3072)
            | sizes("dxd 2dxd 6dxd dx3072 12288xd dx12288", 4096),
        ),
    ),
    marks=(
        Mark("transformer", "self_attention.to_q", columns=(3072, 4096)),
        Mark("transformer", "mlp.gate_proj", rows=(8192, 12288)),
    ),
    architectures=("ernie-image", "ernie_image"),
    modelspec="ERNIE-Image",
)
