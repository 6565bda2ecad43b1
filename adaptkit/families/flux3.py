"""FLUX.3: 5 blocks for each kind of input and 28 joint blocks of width 3072.

Source: diffusers' `convert_flux3_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._plain import spread
from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    pair,
    scaled,
    sizes,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = (
    ("q_proj", "attn.to_q"),
    ("k_proj", "attn.to_k"),
    ("v_proj", "attn.to_v"),
    ("attn_out", "attn.to_out.0"),
    ("mlp_in", "ff.linear_in"),
    ("mlp_out", "ff.linear_out"),
)
BLOCKS = (
    ("content_mode_blocks.image.{i:5}.", "mode_blocks.image.{i:5}."),
    ("content_mode_blocks.image_cond.{i:5}.", "mode_blocks.image_cond.{i:5}."),
    ("txt_mode_blocks.{i:5}.", "txt_mode_blocks.{i:5}."),
    ("single_blocks.{i:28}.", "single_transformer_blocks.{i:28}."),
)
EMBEDDERS = (
    ("time_in", "timestep_embedder"),
    ("ref_time_in", "target_timestep_embedder"),  # step-distilled
)


def _blocks() -> Iterator[Row]:
    for ours, theirs in BLOCKS:
        for native, diffusers in LAYERS:
            yield pair(ours + native, theirs + diffusers)
        for word, letter in (("query", "q"), ("key", "k")):
            yield pair(
                scaled(f"{ours}norm.{word}_norm"), f"{theirs}attn.norm_{letter}", kind=Kind.NORM
            )


ROWS = (
    *(
        pair(f"{ours}.{layer}_layer", f"{theirs}.linear_{n}")
        for ours, theirs in EMBEDDERS
        for layer, n in (("in", 1), ("out", 2))
    ),
    *(pair(f"emb_in.{kind}", f"x_embedders.{kind}") for kind in ("image", "image_cond")),
    pair("txt_in", "context_embedder"),
    *(
        pair(f"{name}.lin", f"{name}.linear")
        for name in spread("(early|single)_stream_modulations.(image|image_cond|txt)")
    ),
    *_blocks(),
    pair("final_layer.image.adaLN_modulation.1", swapped("norm_out.linear")),
    pair("final_layer.image.linear", "proj_out"),
)

FAMILY = ModelFamily(
    name="flux3",
    title="FLUX.3",
    components=(
        transformer(
            "FLUX.3 transformer", ROWS, sizes=sizes("dxd 2dxd 3dxd 6dxd dx3d dx20480", 3072)
        ),
    ),
    marks=(
        Mark("transformer", "q_proj", columns=3072),
        Mark("transformer", "mlp_in", rows=18432),
        Mark("transformer", "mlp_out", rows=3072),
    ),
    architectures=("flux-3", "flux3", "flux.3"),
    modelspec="Flux.3",
)
