"""Leading singular triplets of stacks on accelerators: a fixed number of launches, and two looks.

A device that has to be looked at after every block waits for the host every time. Here a stack
takes four or six blocks of rank + 16 columns, whatever its members are, and the host solves what is
small. Members that this does not suit are told by numbers that the host has anyway.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.hosted import coefficients, fetched, leading_pairs, on_host, stacked
from adaptkit.linalg.krylov import gram_columns, start_block
from adaptkit.linalg.precision import LEAST, MOST, norm_squared

__all__ = [
    "Found",
    "all_energies",
    "grams_of_space",
    "leading_energies",
    "leading_triplets",
    "orthonormal",
    "suits",
]

# blocks of the space. With three, the error of a spectrum that falls linearly is 0.23 % above the
# least one; with four 0.05 %, and less on 33 other spectra that mislead. Few directions take more:
# with four, the first of white noise captures 0.5 % less than it could, with six 0.05 %
BLOCKS, MORE, FEW = 4, 6, 8
SPARE = 16  # columns of a block beside the rank
SHIFT = 1e-10  # of each column's ‖·‖²: keeps the Gram matrix of dependent columns definite
TINY = 1e-60  # and of zero ones
# of ‖A‖²: below it, float32 rounding of the space shows in what is left over
FINE = 1e-6


class Found(NamedTuple):
    """u (B, m, k), s (B, k), v (B, n, k) of a stack, and on the host its energies.

    total: (B,) ‖A‖²   left: (B,) ‖A‖² − Σσ², both in float64
    good: (B,) bool, False for members to be computed singly
    """

    u: Tensor
    s: Tensor
    v: Tensor
    total: Tensor
    left: Tensor
    good: Tensor


def suits(rank: int, smaller: int) -> bool:
    """Whether the space is smaller than the smaller side of the matrix."""
    return _blocks(rank) * (rank + SPARE) <= smaller


def _blocks(rank: int) -> int:
    return MORE if rank <= FEW else BLOCKS


def leading_triplets(a: Tensor, rank: int, seed: int, *, whole: bool) -> Found:
    """The leading `rank` singular triplets of a stack a (B, M, N), M ≥ N.

    From a Krylov space, or with `whole` from all eigenvectors of AᵀA. Then half a
    step of subspace iteration, which halves the excess error, in rank + 16 directions. Members of
    another size than float32 squares suit, or of a residual as small as its rounding, are not good.
    """
    total = norm_squared(a)
    wanted = min(rank + SPARE, a.shape[-1])
    if whole:
        (gram,) = fetched(gram_columns(a))
        found = stacked(on_host(lambda one: (_vectors(one, wanted),), gram))
        x = found[0].to(a.dtype).to(a.device)
    else:
        x = orthonormal(a.mT @ _explored(a, rank, wanted, seed))
    y = a @ x
    basis, image, size = fetched(gram_columns(x), gram_columns(y), total)
    s, left, right = stacked(on_host(partial(coefficients, count=rank), basis, image))
    both = torch.cat([left, right, s.unsqueeze(-2)], -2).to(a.dtype).to(a.device)
    u, v = y @ both[:, :wanted], x @ both[:, wanted:-1]
    rest = size - s.square().sum(-1)
    plain = (size > LEAST) & (size < MOST) & torch.isfinite(image).flatten(1).all(-1)
    good = (size == 0) | (plain & (whole | (rest > FINE * size)))
    return Found(u, both[:, -1], v, size, rest.clamp_min(0.0), good)


def leading_energies(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """About σ² (B, k) of a stack a (B, M, N), M ≥ N, and which are good (B,), both on the host.

    Ritz values of the space alone: one look. Never above the true ones but for rounding.
    """
    total = norm_squared(a)
    basis, image, size = fetched(*grams_of_space(a, rank, seed), total)
    values, _ = stacked(on_host(partial(leading_pairs, count=rank), basis, image))
    rest = size - values.sum(-1)
    plain = (size > LEAST) & (size < MOST) & torch.isfinite(image).flatten(1).all(-1)
    return values, (size == 0) | (plain & (rest > FINE * size))


def all_energies(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`leading_energies` from all eigenvalues of AᵀA, for sides that no space is smaller than."""
    (gram,) = fetched(gram_columns(a))
    (values,) = stacked(on_host(partial(_eigenvalues, count=rank), gram))
    return values, torch.isfinite(gram).flatten(1).all(-1)


def _eigenvalues(gram: Tensor, count: int) -> tuple[Tensor]:
    values: Tensor = torch.linalg.eigvalsh(torch.nan_to_num(gram, 0.0, 0.0, 0.0))
    return (values.flip(-1)[:count].clamp_min(0.0),)


def _vectors(gram: Tensor, count: int) -> Tensor:
    """The leading eigenvectors (N, k) of a Gram matrix on the host."""
    finite = torch.nan_to_num(gram, 0.0, 0.0, 0.0)
    vectors: Tensor = torch.linalg.eigh(finite)[1]
    return vectors.flip(-1)[:, :count].contiguous()


def _space(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """V (B, N, c) and W = A·V of Krylov blocks.

    The blocks are orthonormal within, not between: the Gram matrix of V tells what they share.
    Projecting each onto what is new instead takes twice the launches, for the same errors.
    """
    start = start_block(a.shape[-2], rank + SPARE, seed).to(a.dtype).to(a.device)
    x = a.mT @ start.expand(len(a), *start.shape)
    bases, images = [], []
    for last in (*(False,) * (_blocks(rank) - 1), True):
        x = orthonormal(x)
        y = a @ x
        bases.append(x)
        images.append(y)
        x = x if last else a.mT @ y
    return torch.cat(bases, -1), torch.cat(images, -1)


def grams_of_space(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """VᵀV and VᵀAᵀAV (B, c, c) of a Krylov space of A, for `leading_pairs`."""
    v, w = _space(a, rank, seed)
    return gram_columns(v), gram_columns(w)


def _explored(a: Tensor, rank: int, count: int, seed: int) -> Tensor:
    """About the leading left singular vectors (B, M, count) in a Krylov space of A."""
    v, w = _space(a, rank, seed)
    basis, image = fetched(gram_columns(v), gram_columns(w))

    def unit(basis: Tensor, image: Tensor) -> tuple[Tensor]:
        values, vectors = leading_pairs(basis, image, count)
        alive = values > 0
        return (vectors * torch.where(alive, torch.where(alive, values, 1.0).rsqrt(), 0.0),)

    turn = stacked(on_host(unit, basis, image))[0]
    return w @ turn.to(a.dtype).to(a.device)


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormalise the columns of x (B, n, b) by Cholesky's factor of their Gram matrix.

    To float32 rounding times the condition of x; what x lacks of b directions becomes noise, and
    zero columns stay zero. `qr` runs one by one on CUDA.
    """
    gram = x.to(torch.float64)
    gram = gram.mT @ gram
    own = gram.diagonal(dim1=-2, dim2=-1)
    torch.add(torch.tensor(TINY, dtype=gram.dtype), own, alpha=1.0 + SHIFT, out=own)
    # without a check, which would wait: what fails is not finite, and the host sees that
    factor = torch.linalg.cholesky_ex(gram)[0].to(x.dtype)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
    return solved
