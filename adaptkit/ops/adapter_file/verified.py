"""Compare a finished file with what was meant, block by block, and with what is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import CorruptFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights

__all__ = ["agreed", "distance", "row_blocks", "rows_of"]

CLOSE = 1e-3  # of the error: both are measured in float64, on other orders of the same sums
ROUNDING = 1e-6  # of ‖ΔW‖: a copy decoded in float32
# entries compared at a time: two megabytes in float64, however large a layer is
BLOCK = 1 << 18


def agreed(measured: float, reported: float, output: Path) -> float:
    """The measured relative error; CorruptFile if it is not what is reported."""
    if abs(measured - reported) <= CLOSE * reported + ROUNDING:
        return measured
    raise CorruptFile(
        f"verification failed: read back, its relative error is {measured:.6g}, not {reported:.6g}",
        hint="the file was not written; run again, and report it if it stays",
        file=output,
    )


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of blocks of rows with no more than BLOCK entries, one row at least."""
    step = max(1, BLOCK // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def rows_of(weights: Weights, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of an additive ΔW, in float64."""
    import torch

    if (pair := weights.kron_factors()) is None:
        return weights.part(start, stop).widened().delta().double()
    one, two = pair
    rows = torch.arange(start, stop)
    left, right = (x.double() for x in (one[rows // len(two)], two[rows % len(two)]))
    return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)


def distance(
    meant: Weights, found: Weights, size: tuple[int, int], base: Tensor | None = None
) -> tuple[float, float]:
    """‖ΔW‖² and ‖ΔW − ΔW'‖² of two weights of (rows, columns), a block at a time, in float64.

    If one is not additive, both are applied to `base`. NotRepresentable if it has no such rows.
    """
    norm = rest = 0.0
    for start, stop in row_blocks(*size):
        if base is None:
            one, two = rows_of(meant, start, stop), rows_of(found, start, stop)
        else:
            weight = base[start:stop].double()
            one, two = (x.part(start, stop).apply(weight.clone(), 1.0) for x in (meant, found))
            one, two = one.sub_(weight), two.sub_(weight)
        norm += float(one.square().sum())
        rest += float(one.sub_(two).square().sum())
    return norm, rest
