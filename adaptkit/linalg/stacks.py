"""Leading singular triplets of stacks on accelerators: a fixed number of launches, and two looks.

A device that has to be looked at after every block waits for the host every time. Here a stack
takes four or six blocks of rank + 16 columns, whatever its members are, and the host solves what is
small. Members that this does not suit are told by numbers that the host has anyway.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.hosted import (
    DEPENDENT,
    coefficients,
    fetched,
    leading_pairs,
    on_host,
    stacked,
)
from adaptkit.linalg.krylov import gram_columns, start_block
from adaptkit.linalg.precision import LEAST, MOST, norm_squared

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "TINY",
    "Asked",
    "Found",
    "asked_energies",
    "grams_of_space",
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
TINY = 1e-60  # and of zero ones, which stay zero
# of ‖A‖²: below it, float32 rounding of the space shows in what is left over
FINE = 1e-6
# what a rough space leaves out, as `DEPENDENT`: its third block holds squares of small σ / σ₁
NEARLY = 1e-8


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


def suits(rank: int, smaller: int, *, rough: bool = False) -> bool:
    """Whether the space is smaller than the smaller side of the matrix."""
    if rough:
        return 3 * (2 * rank + SPARE) <= smaller
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


class Asked(NamedTuple):
    """The leading σ² of a stack, before the host has seen what they are made of.

    numbers: small tensors (B, …) on the device, to be fetched in one look, with others if there are
    told: ‖A‖² (B,) and `numbers` on the host → σ² (B, k), NaN for members to be computed singly
    """

    numbers: tuple[Tensor, ...]
    told: Callable[..., Tensor]


def asked_energies(
    a: Tensor, rank: int, seed: int, *, whole: bool = False, rough: bool = False
) -> Asked:
    """About σ² (B, k) of a stack a (B, M, N), M ≥ N. Never above the true ones but for rounding.

    From all eigenvalues of AᵀA if `whole`, else Ritz values of a space: a `rough` one takes half
    the launches.
    """
    if whole:
        return Asked((gram_columns(a),), partial(_of_gram, count=rank))
    if rough:  # however little is left: its share of ‖A‖² is what is asked
        grams = _grams(*_rough_space(a, rank, seed))
        return Asked(grams, partial(_of_space, count=rank, fine=-1.0, dependent=NEARLY))
    return Asked(
        grams_of_space(a, rank, seed),
        partial(_of_space, count=rank, fine=FINE, dependent=DEPENDENT),
    )


def _of_gram(_: Tensor, gram: Tensor, *, count: int) -> Tensor:
    (values,) = stacked(on_host(partial(_eigenvalues, count=count), gram))
    return _good_alone(values, torch.isfinite(gram).flatten(1).all(-1))


def _of_space(
    total: Tensor, basis: Tensor, image: Tensor, *, count: int, fine: float, dependent: float
) -> Tensor:
    solve = partial(leading_pairs, count=count, dependent=dependent)
    values, _ = stacked(on_host(solve, basis, image))
    rest = total - values.sum(-1)
    plain = (total > LEAST) & (total < MOST) & torch.isfinite(image).flatten(1).all(-1)
    return _good_alone(values, (total == 0) | (plain & (rest > fine * total)))


def _good_alone(values: Tensor, good: Tensor) -> Tensor:
    return torch.where(good.unsqueeze(-1), values, torch.nan)


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
    return _grams(*_space(a, rank, seed))


def _grams(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return gram_columns(v), gram_columns(w)


def _rough_space(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """`_space` of three wide blocks, the second one alone orthonormal.

    Over 31 spectra and ranks from 1 to 150, the excess over the least ‖A‖² − Σσ² was 0.45 % of it,
    or 1e-5 of ‖A‖² where little is left.
    """
    start = start_block(a.shape[-2], 2 * rank + SPARE, seed).to(a.dtype).to(a.device)
    first = a.mT @ start.expand(len(a), *start.shape)
    images = [a @ first]
    second = orthonormal(a.mT @ images[0])
    images.append(a @ second)
    third = a.mT @ images[1]
    return torch.cat([first, second, third], -1), torch.cat([*images, a @ third], -1)


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
