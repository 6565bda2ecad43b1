"""Rows of the KL autoencoder of Stable Diffusion and FLUX, renamed between layouts.

No adapter holds it. Source: diffusers' `convert_ldm_vae_checkpoint` (the decoder's levels are
numbered in reverse; attention is 1×1 convolutions in the original, linear layers in diffusers).
`old` are diffusers' names before 0.18.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from adaptkit.families.contract import Component, Kind, Name, Row, named, row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["autoencoder"]

LEVELS = 4
RESNET = (
    ("norm1", "norm1", Kind.NORM, ()),
    ("conv1", "conv1", Kind.MATRIX, (3, 3)),
    ("norm2", "norm2", Kind.NORM, ()),
    ("conv2", "conv2", Kind.MATRIX, (3, 3)),
    ("conv_shortcut", "nin_shortcut", Kind.MATRIX, (1, 1)),
)
ATTENTION = (
    ("to_q", "q", "query"),
    ("to_k", "k", "key"),
    ("to_v", "v", "value"),
    ("to_out.0", "proj_out", "proj_attn"),
)


def autoencoder(*native: str) -> Component:
    """The autoencoder; `native` are its prefixes in single files, the written one first."""
    diffusers = ("vae.",)
    return Component(
        name="vae",
        title="autoencoder",
        rows=_rows(),
        checkpoints={"native": native, "diffusers": diffusers, "old": diffusers},
    )


@cache  # most families have it
def _rows() -> tuple[Row, ...]:
    return tuple(_each())


def _each() -> Iterator[Row]:
    for name in ("quant_conv", "post_quant_conv"):
        yield row(name, native=name, kernel=(1, 1))
    for side in ("encoder", "decoder"):
        yield row(f"{side}.conv_in", native=f"{side}.conv_in", kernel=(3, 3))
        yield row(f"{side}.conv_out", native=f"{side}.conv_out", kernel=(3, 3))
        yield row(f"{side}.conv_norm_out", native=f"{side}.norm_out", kind=Kind.NORM)
        yield from _middle(f"{side}.mid_block.", f"{side}.mid.")
    for n in range(LEVELS):
        ours, theirs = f"encoder.down_blocks.{n}.", f"encoder.down.{n}."
        yield from _resnet(f"{ours}resnets.{{i}}.", f"{theirs}block.{{i}}.")
        yield row(f"{ours}downsamplers.0.conv", native=f"{theirs}downsample.conv", kernel=(3, 3))
        ours, theirs = f"decoder.up_blocks.{n}.", f"decoder.up.{LEVELS - 1 - n}."
        yield from _resnet(f"{ours}resnets.{{i}}.", f"{theirs}block.{{i}}.")
        yield row(f"{ours}upsamplers.0.conv", native=f"{theirs}upsample.conv", kernel=(3, 3))


def _middle(ours: str, theirs: str) -> Iterator[Row]:
    for n in range(2):
        yield from _resnet(f"{ours}resnets.{n}.", f"{theirs}block_{n + 1}.")
    attention = f"{ours}attentions.0."
    yield row(f"{attention}group_norm", native=f"{theirs}attn_1.norm", kind=Kind.NORM)
    for name, native, old in ATTENTION:
        yield row(
            attention + name, native=_pointwise(f"{theirs}attn_1.{native}"), old=attention + old
        )


def _pointwise(module: str) -> Name:
    return named(module)._replace(kernel=(1, 1))


def _resnet(ours: str, theirs: str) -> Iterator[Row]:
    return (
        row(ours + name, native=theirs + native, kind=kind, kernel=kernel)
        for name, native, kind, kernel in RESNET
    )
