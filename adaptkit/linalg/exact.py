"""The leading singular vectors of a matrix to float64 accuracy, without a copy of the matrix.

Its smaller Gram matrix is decomposed in place of it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.linalg.krylov import eigh
from adaptkit.linalg.precision import works_on_stacks

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["leading_basis", "leading_vectors", "times"]

# of the largest eigenvalue of AᵀA: float64 tells it and its vector to eight digits. Smaller ones
# are sought in what the larger ones leave of A, where they are large.
CLEAR = 1e-8
ROWS = 256  # rows of A widened at a time: fewer would wait for the Gram matrix to be read


def leading_vectors(gram: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,), descending, and `count` leading eigenvectors (N, count) of a Gram matrix.

    As of `eigh`. On a CPU they overwrite what `gram` makes, which saves half of the memory.
    """
    made = gram()
    if works_on_stacks(made.device):
        values, vectors = eigh(made)
        return values, vectors[:, :count]
    values, columns = torch.empty_like(made[0]), made.mT  # LAPACK's order: nothing is copied
    try:
        torch.linalg.eigh(columns, out=(values, columns))
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        values, vectors = eigh(gram())
        return values, vectors[:, :count]
    return values.flip(-1).clamp_min(0.0), columns[:, columns.shape[1] - count :].flip(-1)


def leading_basis(a: Tensor, rank: int) -> Tensor:
    """Orthonormal v (N, rank) in float64: the leading right singular vectors of a (M, N).

    Eigenvectors of AᵀA alone would lose σ below 1e-8 σ₁. So those of 1e-4 σ₁ and more are taken
    first, and then those of A (I − v vᵀ) in the same way. The error of the best approximation in
    this space is that of LAPACK's SVD in float64.
    """
    found = a.new_zeros(a.shape[1], 0, dtype=torch.float64)
    while (left := rank - found.shape[1]) > 0:
        values, vectors = leading_vectors(partial(_gram_beside, a, found), left)
        clear = int((values >= CLEAR * values[0]).sum())
        # QR: where nothing is left of A, the vectors are any, also those found before
        before, found = found.shape[1], torch.cat([found, vectors[:, :clear]], 1)
        found = torch.linalg.qr(found).Q if before else found
    return found


def _gram_beside(a: Tensor, found: Tensor) -> Tensor:
    """BᵀB (N, N) in float64 for B = A (I − v vᵀ), with a (M, N) and v = `found` (N, k)."""
    total = a.new_zeros(a.shape[1], a.shape[1], dtype=torch.float64)
    for start in range(0, len(a), ROWS):
        block = a[start : start + ROWS].to(torch.float64)
        if found.shape[1]:
            block = block - (block @ found) @ found.mT
        total.addmm_(block.mT, block)
    return total


def times(a: Tensor, v: Tensor) -> Tensor:
    """A · v (M, k) in float64, of a (M, N) and v (N, k) in float64, a block of rows at a time."""
    result = v.new_empty(len(a), v.shape[1])
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        torch.mm(a[rows].to(v.dtype), v, out=result[rows])
    return result
