"""Look at one difference: its norm, its rounding noise, its rank and its Kronecker split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.files.quantized import FP8
from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.linalg.kron.scan import KronScan, Split
    from adaptkit.linalg.noise import RoundingNoise
    from adaptkit.ops.difference.pairing import Pair

__all__ = [
    "BLOCKS",
    "Look",
    "as_rounded",
    "look",
    "looking_bytes",
    "read_difference",
    "reading",
    "reading_bytes",
]

BLOCKS = 6_000_000  # bytes that reading a weight in blocks of rows takes
KRYLOV = 448  # directions of a space in which ranks up to 64 are counted


@dataclass(frozen=True)
class Look:
    """Findings on one layer: ‖Δ‖², its rounding noise, its rank, its Kronecker split.

    `rank` is None unless Δ is of low rank up to rounding, `split` unless Δ is a Kronecker product.
    `noise` equals `floor`, but is 0 if Δ cannot be distinguished from the rounding grid.
    """

    norm: float
    floor: float = 0.0
    rank: int | None = None
    split: Split | None = None
    noise: float = 0.0


def as_rounded(tuned: Checkpoint, pair: Pair, tensor: Tensor) -> Tensor:
    """Return a weight in the dtype it was rounded to; scaled fp8 stays float32."""
    dtypes = tuned.dtypes(pair.tuned)
    scaled = any(piece.name in tuned.quantization.scales for piece in pair.tuned)
    return tensor.to(torch_dtype(min(dtypes))) if dtypes <= set(FP8) and not scaled else tensor


def read_difference(base: Checkpoint, tuned: Checkpoint, pair: Pair) -> dict[str, Tensor]:
    """Read Δ and ‖Δ‖² of a layer, and the noise (`rows`, `columns`) of the tuned one's rounding.

    The base is never in memory as a whole, and the tuned weight only meanwhile.
    """
    from adaptkit.linalg.noise import rounding_noise
    from adaptkit.linalg.precision import STREAM, streamed_difference

    step = max(1, STREAM // max(1, pair.matrix[1]))
    whole = tuned.read(pair.tuned)
    noise = rounding_noise(as_rounded(tuned, pair, whole))
    theirs = (whole[start : start + step] for start in range(0, len(whole), step))
    delta, norm = streamed_difference(
        zip(theirs, base.blocks(pair.base, step), strict=True), pair.matrix
    )
    return {"delta": delta, "norm": norm, "rows": noise.rows, "columns": noise.columns}


def reading_bytes(base: Checkpoint, tuned: Checkpoint, pair: Pair) -> int:
    """Return the memory that `read_difference` takes, Δ included."""
    rows, columns = pair.matrix
    theirs, held = reading(tuned, pair.tuned, whole=True)
    ours, kept = reading(base, pair.base)
    scratch = min(4 * rows * columns, BLOCKS // 2)
    return max(theirs, held + ours, held + kept + 4 * rows * columns + scratch)


def reading(
    checkpoint: Checkpoint, pieces: tuple[Piece, ...], *, whole: bool = False
) -> tuple[int, int]:
    """Return the memory that reading a weight takes, in blocks of rows unless `whole`, and then."""
    most, held = checkpoint.nbytes(pieces), checkpoint.held_bytes(pieces)
    if whole or not checkpoint.streams(pieces):
        return most, held
    return min(most, BLOCKS), min(most, BLOCKS)


def look(
    pair: Pair, delta: Tensor, norm: float, noise: RoundingNoise, scan: KronScan | None = None
) -> Look:
    """Examine a difference (m, n) with norm² > 0, whose memory is used; `noise` is its rounding."""
    from adaptkit.linalg.kron.scan import FACTORS, scan_kron
    from adaptkit.linalg.noise import WEAK, rank_above_noise, zero_share

    scan = scan or scan_kron(
        delta, math.prod(pair.shape[2:]), [factor for factor in FACTORS if factor > 0]
    )
    which = int(scan.recognised(noise.floor))
    told = float(zero_share(delta)) < WEAK
    found = rank_above_noise(delta, noise, overwrite=True) if told else None
    low = found is not None and bool(found.low_rank)
    return Look(
        norm,
        min(float(noise.floor), norm),
        int(found.rank) if found is not None and low else None,
        scan.splits[which] if which >= 0 else None,
        float(noise.floor) if told else 0.0,
    )


def looking_bytes(pair: Pair) -> int:
    """Return the memory that `look` takes: Δ, its blocks rearranged, or a Krylov space."""
    rows, columns = pair.matrix
    space = 4 * (rows + columns + min(rows, columns)) * min(rows, columns, KRYLOV)
    return 4 * rows * columns + max(4 * rows * columns, space)
