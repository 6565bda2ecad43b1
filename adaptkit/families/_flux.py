"""Rows that FLUX.1 and its kin (Chroma, FLUX.2) share: double and single blocks.

Source of the correspondence: black-forest-labs `flux/model.py` against diffusers' `FluxTransformer2DModel`, as
diffusers' `convert_flux_transformer_checkpoint_to_diffusers` maps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._family import Kind, Row, pair, scaled, split

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["double_attention", "single_norms"]

SIDES = (("img", "to_{}", "to_out.0", "norm_{}", 1), ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", 2))


def double_attention(native: str, diffusers: str) -> Iterator[Row]:
    """Attention of a double block: fused q, k, v and a projection per side, with their norms."""
    for side, project, out, norm, number in SIDES:
        ours = f"{native}{side}_attn."
        qkv = split(f"{diffusers}attn.", *(project.format(letter) for letter in "qkv"))
        yield pair(
            f"{ours}qkv",
            qkv,
            omi=split(f"{ours}qkv.", "0", "1", "2"),
            xlabs=f"{native}processor.qkv_lora{number}",
        )
        yield pair(f"{ours}proj", f"{diffusers}attn.{out}", xlabs=f"{native}processor.proj_lora{number}")
        for word, letter in (("query", "q"), ("key", "k")):
            name = scaled(f"{ours}norm.{word}_norm")
            yield pair(name, f"{diffusers}attn.{norm.format(letter)}", kind=Kind.NORM)


def single_norms(native: str, diffusers: str) -> Iterator[Row]:
    """The q and k norms of a single block."""
    for word, letter in (("query", "q"), ("key", "k")):
        yield pair(scaled(f"{native}norm.{word}_norm"), f"{diffusers}attn.norm_{letter}", kind=Kind.NORM)
