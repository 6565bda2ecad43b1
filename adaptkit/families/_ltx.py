"""Rows shared by LTX-Video and LTX-2, with few renamed modules in diffusers.

Source: diffusers' `convert_ltx_to_diffusers` and `convert_ltx2_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import Kind, Row, named, pair, row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["adaln", "attention", "ends", "feed_forward", "table", "video_rows"]


def table(native: str, diffusers: str | None = None) -> Row:
    """A learned scale-and-shift parameter without a module of its own."""
    theirs = diffusers or native
    return pair(named(native, weight=native), named(theirs, weight=theirs), kind=Kind.NORM)


def adaln(native: str, diffusers: str) -> Iterator[Row]:
    """A modulation computed from the time step."""
    for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"):
        yield pair(f"{native}.{name}", f"{diffusers}.{name}")


def attention(native: str, diffusers: str = "", *, gate: bool = False) -> Iterator[Row]:
    """q, k, v, the projection, the norms of q and k, and the `gate` of each head."""
    theirs = diffusers or native
    for name in ("to_q", "to_k", "to_v", "to_out.0", *["to_gate_logits"] * gate):
        yield _same(f"{native}.{name}", f"{theirs}.{name}")
    for letter in "qk":
        yield pair(f"{native}.{letter}_norm", f"{theirs}.norm_{letter}", kind=Kind.NORM)


def feed_forward(native: str, diffusers: str = "") -> Iterator[Row]:
    """The two layers of an MLP."""
    for name in ("net.0.proj", "net.2"):
        yield _same(f"{native}.{name}", f"{diffusers or native}.{name}")


def _same(native: str, diffusers: str) -> Row:
    return row(native) if native == diffusers else pair(native, diffusers)


def ends(stem: str = "") -> Iterator[Row]:
    """Layers before and after the blocks, for the video or (`audio_`) the sound."""
    yield pair(f"{stem}patchify_proj", f"{stem}proj_in")
    yield from adaln(f"{stem}adaln_single", f"{stem}time_embed")
    yield row(f"{stem}caption_projection.linear_1")
    yield row(f"{stem}caption_projection.linear_2")
    yield row(f"{stem}proj_out")
    yield table(f"{stem}scale_shift_table")


def video_rows(blocks: int) -> tuple[Row, ...]:
    """All rows of LTX-Video with this many blocks."""
    block = f"transformer_blocks.{{i:{blocks}}}."
    return (
        *ends(),
        *attention(f"{block}attn1"),
        *attention(f"{block}attn2"),
        *feed_forward(f"{block}ff"),
        table(f"{block}scale_shift_table"),
    )
