"""Kronecker products, and what the blocks of a matrix tell about them.

R(X) has one block of X per row: ‖X − w1 ⊗ w2‖_F = ‖R(X) − vec(w1) vec(w2)ᵀ‖_F (Van Loan and
Pitsianis 1993). Where a few sums over the blocks suffice, R(X) is made in pieces only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg.krylov import add_gram, mirrored
from adaptkit.linalg.lowrank import EXPLICIT, LowRank
from adaptkit.linalg.precision import SCRATCH, empty, norm_squared, works_on_stacks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "GRAM_SIDE",
    "block_gram",
    "combined_blocks",
    "factorization",
    "kron",
    "kron_added",
    "kron_distance",
    "kron_rows",
    "leading_kron",
    "rearrange",
]

# up to this number of blocks (or entries per block) the Gram matrix is as cheap as Lanczos, and
# gives coarser splits too
GRAM_SIDE = 256
RUN = 1 << 13  # products summed in float32 before float64


def factorization(dim: int, factor: int = -1) -> tuple[int, int]:
    """Split a dimension for LoKr: (small, large) with small · large = dim.

    `factor` and its cofactor, the smaller first, if `factor` divides dim. Otherwise the greatest
    divisor up to `factor` (any, for -1) that does not exceed its cofactor. Identical to LyCORIS
    `functional/general.py: factorization`, from which loaders infer the factor.
    """
    if factor > 0 and dim % factor == 0:
        return min(factor, dim // factor), max(factor, dim // factor)
    limit = dim if factor < 0 else factor
    small = max(n for n in range(1, min(limit, math.isqrt(dim)) + 1) if dim % n == 0)
    return small, dim // small


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 (..., a, b) ⊗ w2 (..., c, d) → (..., a·c, b·d); block (i, j) is w1[i, j] · w2."""
    a, b = w1.shape[-2:]
    c, d = w2.shape[-2:]
    blocks = w1[..., :, None, :, None] * w2[..., None, :, None, :]
    return blocks.reshape(*blocks.shape[:-4], a * c, b * d)


def kron_rows(w1: Tensor, w2: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of w1 ⊗ w2, (..., stop - start, b·d), with the bits of `kron`.

    Row i is row i ÷ c of w1 ⊗ row i mod c of w2.
    """
    rows = torch.arange(start, stop, device=w1.device)
    one, two = w1[..., rows // w2.shape[-2], :], w2[..., rows % w2.shape[-2], :]
    return (one.unsqueeze(-1) * two.unsqueeze(-2)).flatten(-2)


def kron_added(x: Tensor, w1: Tensor, w2: Tensor, strength: float, out: Tensor) -> Tensor:
    """x + strength · (w1 ⊗ w2) in `out`, both (..., a·c, b·d), in one pass without a product.

    In the widest dtype of x, w1 (..., a, b) and w2 (..., c, d), rounded once to that of `out`.
    """
    (a, b), (c, d) = w1.shape[-2:], w2.shape[-2:]
    blocks, made = (t.view(*t.shape[:-2], a, c, b, d) for t in (x, out))
    one, two = w1[..., :, None, :, None], w2[..., None, :, None, :]
    torch.addcmul(blocks, one, two, value=strength, out=made)
    return out


def rearrange(x: Tensor, a: int, b: int) -> Tensor:
    """Rearrange x (..., a·c, b·d) to R (..., a·b, c·d) with one block per row. One copy.

    Row i·b + j is block (i, j), flattened. Raises `ShapeMismatch` if a or b does not divide.
    """
    c, d = _block(x, a, b)
    whole = empty((*x.shape[:-2], a * b, c * d), x.dtype, x.device)
    whole.view(*x.shape[:-2], a, b, c, d).copy_(
        x.reshape(*x.shape[:-2], a, c, b, d).transpose(-3, -2)
    )
    return whole


def _block(x: Tensor, a: int, b: int) -> tuple[int, int]:
    """The shape (c, d) of a block of x (..., a·c, b·d)."""
    if x.shape[-2] % a or x.shape[-1] % b:
        raise ShapeMismatch(f"{x.shape[-2]} × {x.shape[-1]} does not divide into {a} × {b} blocks")
    return x.shape[-2] // a, x.shape[-1] // b


def _pieces(x: Tensor, a: int, b: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of all blocks of x (a·c, b·d), as columns of R(x): r (a·b, rows · d).

    They stay in a CPU's cache. An accelerator takes all at once.
    """
    c, d = _block(x, a, b)
    blocks = x.reshape(a, c, b, d)
    step = c if works_on_stacks(x.device) else max(1, SCRATCH // max(1, a * b * d))
    for start in range(0, c, max(1, step)):
        some = blocks[:, start : start + step]
        yield slice(start, start + some.shape[1]), some.transpose(1, 2).reshape(a * b, -1)


def block_gram(x: Tensor, a: int, b: int) -> Tensor:
    """R Rᵀ (a·b, a·b) in float64, with R the rearranged x (a·c, b·d).

    Of products in the dtype of x, of which runs of 8192 are summed in it.
    """
    total = torch.zeros(a * b, a * b, dtype=torch.float64, device=x.device)
    for _, r in _pieces(x, a, b):
        whole = r.shape[1] // RUN * RUN
        if whole:
            runs = r[:, :whole].reshape(len(r), -1, RUN).transpose(0, 1)
            total += (runs @ runs.mT).sum(0, dtype=total.dtype)
        if whole < r.shape[1]:
            add_gram(total, r[:, whole:].mT)
    return mirrored(total)


def combined_blocks(x: Tensor, w1: Tensor) -> Tensor:
    """The sum (c, d) of w1[i, j] · block (i, j) of x (a·c, b·d): the best w2 for a w1 of norm 1."""
    a, b = w1.shape
    found = x.new_empty(_block(x, a, b))
    weights = w1.reshape(-1)
    for rows, r in _pieces(x, a, b):
        torch.mv(r.mT, weights, out=found[rows].view(-1))
    return found


def kron_distance(x: Tensor, w1: Tensor, w2: Tensor, total: float) -> float | None:
    """‖X − w1 ⊗ w2‖² of x (a·c, b·d) with ‖X‖² = `total`, in one pass over x.

    As `lowrank.product_distance`: None where that cancels, and on accelerators.
    """
    if works_on_stacks(x.device):
        return None
    # by a power of two, which changes no bit: products with tiny differences leave float32
    size = math.sqrt(total / x.numel()) * float(w1.abs().amax())
    unit = 2.0 ** (-40 - math.frexp(size)[1]) if size > 0 else 1.0
    weights = w1.double().mul(unit).to(x.dtype).reshape(-1)
    across = 0.0
    for rows, r in _pieces(x, *w1.shape):
        second = w2[rows].reshape(-1).double()
        across += float(torch.dot(torch.mv(r.mT, weights).double(), second))
    own = float(norm_squared(w1)) * float(norm_squared(w2))
    found = total - 2.0 * across / unit + own
    return found if found >= EXPLICIT * total else None


def leading_kron(one: LowRank, two: LowRank, scale: float, rank: int) -> LowRank:
    """The leading `rank` singular triplets of scale · (A ⊗ B), from those of A and B.

    The singular values are the products of theirs.
    """
    products = (one.s.unsqueeze(-1) * two.s.unsqueeze(-2)).flatten(-2)
    s, index = products.topk(min(rank, products.shape[-1]))
    rest = products.double().square().sum(-1) - s.double().square().sum(-1)
    i, j = index // two.s.shape[-1], index % two.s.shape[-1]
    u = _paired(one.u, two.u, i, j)
    v = _paired(one.vh.mT, two.vh.mT, i, j)
    return LowRank(
        u * (-1.0 if scale < 0 else 1.0), abs(scale) * s, v.mT, (scale**2 * rest).clamp_min(0)
    )


def _paired(one: Tensor, two: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Columns i of one (..., a, ·) ⊗ columns j of two (..., c, ·), (..., a·c, k)."""
    left = one.gather(-1, i.unsqueeze(-2).expand(*one.shape[:-1], -1))
    right = two.gather(-1, j.unsqueeze(-2).expand(*two.shape[:-1], -1))
    return (left.unsqueeze(-2) * right.unsqueeze(-3)).flatten(-3, -2)
