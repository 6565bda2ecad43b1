"""What training started from, of kinds whose factors are first those of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.linalg.lowrank import LowRank

__all__ = ["leading", "leading_bytes", "with_product"]


KEPT = 5_000_000  # bytes of workspace that a BLAS keeps for a thread, as MKL does


def leading(weight: Tensor, rank: int) -> LowRank:
    """The leading singular triplets of W (..., m, n), to float64."""
    from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

    return truncated_svd(weight, SvdSpec(rank, method="exact"))


def leading_bytes(rows: int, columns: int) -> int:
    """Bytes that `leading` takes beside W: a Gram matrix in float64 that its eigenvectors
    overwrite, and the workspace of LAPACK.
    """
    return 24 * min(rows, columns) ** 2 + min(12 * min(rows, columns) ** 2, KEPT)


def with_product(base: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """W + factor · left · right in the place of W (..., m, n), a block of rows at a time."""
    from adaptkit.linalg.precision import row_blocks

    for rows in row_blocks(base):
        base[..., rows, :].add_(left[..., rows, :] @ right, alpha=factor)
    return base
