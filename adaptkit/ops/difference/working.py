"""The working memory of decompositions, from shapes alone, as measured (tests/ops/peaks.py)."""

from __future__ import annotations

from adaptkit.algorithms._start import leading_bytes

__all__ = ["eigen_bytes", "energies_bytes", "svd_bytes"]

SMALL = 128  # the smaller side up to which a Gram matrix is decomposed, as in linalg.lowrank
STEPS = 5  # directions of a Krylov space for each that is asked for


def eigen_bytes(side: int) -> int:
    """Bytes of a Gram matrix in float64, its eigenvectors, and the workspace of LAPACK."""
    return 36 * side**2


def energies_bytes(rows: int, columns: int, rank: int, *, rough: bool = False) -> int:
    """Bytes that the leading `rank` singular values of a matrix take beside the matrix itself.

    A Gram matrix and the copy that LAPACK overwrites are of float64, of float32 if `rough`.
    """
    smaller = min(rows, columns)
    rank = min(rank, smaller)
    if _by_gram(smaller, rank):
        return (10 if rough else 20) * smaller**2
    space = min(smaller, STEPS * rank + 32)
    return 4 * (rows + columns + smaller) * space + eigen_bytes(space)


def svd_bytes(rows: int, columns: int, rank: int, method: str = "auto") -> int:
    """Bytes that the leading `rank` triplets of a matrix take beside the matrix itself."""
    smaller = min(rows, columns)
    rank = min(rank, smaller)
    thin = 24 * max(rows, columns) * rank  # one side, its QR and the result
    whole = leading_bytes(rows, columns)
    if method == "exact":
        return max(whole, thin) + 16 * smaller * rank
    if method == "gram" or _by_gram(smaller, rank):
        return max(whole, 8 * smaller**2 + thin)
    return energies_bytes(rows, columns, rank) + thin


def _by_gram(smaller: int, rank: int) -> bool:
    """Whether `linalg.lowrank` decomposes a Gram matrix."""
    return smaller <= SMALL or 4 * rank + 32 > smaller / 2
