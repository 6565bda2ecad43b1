"""Rows of double and single blocks, shared by FLUX.1, Chroma and FLUX.2.

Source: black-forest-labs `flux/model.py` and diffusers' `FluxTransformer2DModel`, mapped as in
diffusers' `convert_flux_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import Kind, Mark, Row, pair, scaled, split

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "SHARES",
    "SIZES",
    "double_attention",
    "double_mlps",
    "embedder",
    "marks",
    "single_block",
    "single_norms",
]

# sizes of FLUX.1's layers, d wide, which other families share
SIZES = "dxd 2dxd 3dxd 4dxd 6dxd 7dxd dx4d dx5d dx768 dx4096"

SIDES = (
    ("img", "to_{}", "to_out.0", "norm_{}", "to_qkv"),
    ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "to_added_qkv"),
)
SHARES = (1, 1, 1, 4)  # q, k, v and the MLP


def embedder(native: str, diffusers: str) -> Iterator[Row]:
    """An embedder of two linear layers: `time_in.in_layer`, `time_in.out_layer`."""
    for layer, n in (("in", 1), ("out", 2)):
        yield pair(f"{native}.{layer}_layer", f"{diffusers}.linear_{n}")


def double_attention(native: str, diffusers: str, *, plain: bool = False) -> Iterator[Row]:
    """Attention of a double block: fused qkv, projection and norms per side.

    `plain`: see `_norm`.
    """
    for side, project, out, norm, joint in SIDES:
        ours = f"{native}{side}_attn."
        yield pair(
            f"{ours}qkv",
            split(f"{diffusers}attn.", *(project.format(letter) for letter in "qkv")),
            # diffusers' `fuse_projections`, which a LoKr of BFL's names is loaded into
            fused=f"{diffusers}attn.{joint}",
        )
        yield pair(f"{ours}proj", f"{diffusers}attn.{out}")
        for word, letter in (("query", "q"), ("key", "k")):
            theirs = f"{diffusers}attn.{norm.format(letter)}"
            yield _norm(f"{ours}norm.{word}_norm", theirs, plain)


def _norm(native: str, diffusers: str, plain: bool) -> Row:
    """A norm with a weight called `scale`; `plain`: so only in files made for old ComfyUIs."""
    if plain:
        return pair(native, diffusers, scaled=scaled(native), kind=Kind.NORM)
    return pair(scaled(native), diffusers, kind=Kind.NORM)


def double_mlps(
    native: str, diffusers: str, first: str = "net.0.proj", second: str = "net.2"
) -> Iterator[Row]:
    """The MLPs of a double block.

    `first` and `second` are diffusers' names of their layers.
    """
    for ours, theirs in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
        yield pair(f"{native}{ours}.0", f"{diffusers}{theirs}.{first}")
        yield pair(f"{native}{ours}.2", f"{diffusers}{theirs}.{second}")


def single_block(
    native: str, diffusers: str, *, shares: tuple[int, ...] = SHARES, plain: bool = False
) -> Iterator[Row]:
    """A single block without its modulation.

    linear1 is q, k, v and the MLP's first layer, in these shares; linear2 is out and the MLP's
    second layer. `plain`: see `_norm`.
    """
    yield pair(
        f"{native}linear1",
        split(diffusers, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", ratio=shares),
    )
    yield pair(f"{native}linear2", f"{diffusers}proj_out")
    yield from single_norms(native, diffusers, plain=plain)


def single_norms(native: str, diffusers: str, *, plain: bool = False) -> Iterator[Row]:
    """The norms of q and k in a single block; `plain`: see `_norm`."""
    for word, letter in (("query", "q"), ("key", "k")):
        yield _norm(f"{native}norm.{word}_norm", f"{diffusers}attn.norm_{letter}", plain)


def marks(*widths: int, mlp: int, single: int) -> tuple[Mark, ...]:
    """Marks of models of these widths.

    `mlp` and `single` are the rows per width of the MLPs' first layers and of linear1. Look-alikes
    are marked by the same modules, so that a file that fits both scores the same for both.
    """
    return (
        Mark("transformer", "img_attn.qkv", columns=widths),
        Mark("transformer", "img_mlp.0", rows=tuple(mlp * width for width in widths)),
        Mark("transformer", "linear1", rows=tuple(single * width for width in widths)),
    )
