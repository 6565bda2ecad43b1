"""Singular values, norms and inner products of factored matrices, never multiplied out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import NonFinite
from adaptkit.linalg.krylov import eigh
from adaptkit.linalg.lowrank import LowRank, signed
from adaptkit.linalg.precision import (
    compute_dtype,
    each,
    entry_sum,
    members,
    one_by_one,
    product,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Core", "factored_core", "factored_svd"]

# bound on (size of the terms / size of the product): float32 then still gives six digits
CLEAR = 256.0
# share of ‖ΔW‖²: a smaller loss is rounding alone, which float32 does not resolve
LOST = 1e-4
# share of the largest pivot: above it, a Gram matrix is regular enough for Cholesky
REGULAR = 1e-3

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Core:
    """SVD of left (..., m, r) · right (..., r, n) in terms of the factors.

    u = left · `left`, vh = `right` · right.
    left: (..., r, r)   s: (..., r), descending   right: (..., r, r)

    In float64 on the host. Dead directions have s = 0 and no vectors. The largest entry of each
    column of `left` is positive. A core is small, so that the factors need not stay in memory.
    `grams`, (..., 2, r, r), are leftᵀ·left and right·rightᵀ of the factors in float64, or None.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    grams: Tensor | None = None

    def head(self, rank: int) -> Core:
        """The leading `rank` triplets in float32, the dtype in which `kept` multiplies."""
        left, right = self.left[..., :rank].float(), self.right[..., :rank, :].float()
        return Core(left, self.s[..., :rank], right, self.grams)

    def members(self) -> Iterator[Core]:
        """The cores of a stack (one leading dimension)."""
        grams = [None] * len(self.s) if self.grams is None else self.grams
        return (Core(*own) for own in zip(self.left, self.s, self.right, grams, strict=True))

    @classmethod
    def stack(cls, cores: Sequence[Core], ranks: Sequence[int]) -> Core:
        """Stack cores, each with its leading `rank` triplets, padded with zeros."""
        most = max(ranks)
        s = torch.stack([core.s[:most] for core in cores])
        s *= torch.arange(most, device=s.device) < torch.tensor(ranks, device=s.device).unsqueeze(
            -1
        )
        left, right = [core.left[:, :most] for core in cores], [core.right[:most] for core in cores]
        grams = [core.grams for core in cores if core.grams is not None]
        whole = torch.stack(grams) if len(grams) == len(cores) else None
        return cls(torch.stack(left), s, torch.stack(right), whole)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.left, self.s, self.right, self.grams) if t is not None)

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Multipliers that truncate the factors: (..., r, k) and (..., k, r), √s on both sides."""
        root = self.s.sqrt()
        return (self.left * root.unsqueeze(-2)).to(dtype), (root.unsqueeze(-1) * self.right).to(
            dtype
        )

    def kept(self, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Best approximation of rank k: left (..., m, k), right (..., k, n), √s on both sides.

        Computed in the dtype of the given factors.
        """
        ours, theirs = (t.to(left.device) for t in self.coefficients(left.dtype))
        return product(left, ours[..., :rank]), product(theirs[..., :rank, :], right)

    def distances(self, factors: Factors, kept: Factors, stored: Factors) -> Tensor:
        """‖left · right − stored‖² (...,) in float64; `stored` is `kept` after rounding.

        All factors are float32. The Gram matrices of `stored` follow from those of the factors and
        from products with the rounding errors, which are small enough for float32. Takes a quarter
        of the time of `product_distance`. NaN if the result would have fewer than six digits:
        almost nothing is lost, or a product of the factors cancels.
        """
        return self.told(self.changes(factors, kept, stored))

    def changes(self, factors: Factors, kept: Factors, stored: Factors) -> tuple[Tensor, ...]:
        """Four small matrices of `distances` on the device of the factors, for `told`.

        Of each side the product of its rounding errors with the factor (..., k, r), and with
        themselves (..., k, k).
        """
        ours = _changed((stored[0] - kept[0]).mT, factors[0])
        return *ours, *_changed(stored[1] - kept[1], factors[1].mT)

    def told(self, changes: Sequence[Tensor]) -> Tensor:
        """The `distances` (...,), from `changes` where the core is."""
        if self.grams is None:
            return torch.full_like(self.s[..., 0], math.nan)
        ours, theirs = (t.to(self.grams.dtype) for t in self.coefficients(torch.float32))
        both = (
            (ours.mT, self.grams[..., 0, :, :], *changes[:2]),
            (theirs, self.grams[..., 1, :, :], *changes[2:]),
        )
        (cross, own, clear), (other, second, clean) = (_stored_grams(*side) for side in both)
        total = self.energy
        found = total - 2.0 * entry_sum(cross * other) + entry_sum(own * second)
        return torch.where((found > LOST * total) & clear & clean, found, math.nan)

    @property
    def energy(self) -> Tensor:
        """‖left · right‖² (...,) of the whole factors."""
        assert self.grams is not None
        return entry_sum(self.grams[..., 0, :, :] * self.grams[..., 1, :, :])


def _changed(change: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """change · factor (..., k, r) and change · changeᵀ (..., k, k), for change (..., k, m)."""
    # one of two factors may be stored in float64
    wide = torch.promote_types(change.dtype, factor.dtype)
    return product(change.to(wide), factor.to(wide)), product(change, change.mT)


def _stored_grams(
    cut: Tensor, gram: Tensor, moved: Tensor, square: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of one side of a stored product, s = cut · factorᵀ + change (k, m).

    Returns s · factor, s · sᵀ, and whether no digits cancel.

    cut: (..., k, r)   gram = factorᵀ · factor: (..., r, r)
    moved = change · factor: (..., k, r)   square = change · changeᵀ: (..., k, k)
    """
    moved = moved.to(gram.dtype)
    half = product(moved, cut.mT)
    exact = product(cut, gram)
    own = product(exact, cut.mT) + half + half.mT + square.to(gram.dtype)
    # of the sum of cut[:, i] · factor[:, i], however the columns of the factor are graded
    terms = cut.abs() @ gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
    clear = terms.squeeze(-1) <= CLEAR * own.diagonal(dim1=-2, dim2=-1).sqrt()
    return exact + moved, own, clear.all(-1)


def factored_core(left: Tensor, right: Tensor) -> Core:
    """Decompose left (..., m, r) · right (..., r, n) by r × r matrices alone.

    Gram matrices and their decompositions in float64: rank-revealing, as accurate as float64 QR
    down to σ/σ₁ of about 1e-7, and as fast as float32 QR. How a term left[:, i] · right[i] is
    shared between the factors makes no difference: both get equal norms first, by powers of two.
    Raises `NonFinite` for NaN and infinity. On a CPU equal factors give equal bits, whatever else
    is in the stack.
    """
    up, down = left.double(), right.double()
    # r × r matrices are decomposed on the CPU: see `eigh`
    grams = torch.stack([product(up.mT, up), product(down, down.mT)], -3).cpu()
    even = _evening(*grams.diagonal(dim1=-2, dim2=-1).unbind(-2))
    both = even.unsqueeze(-1) * even.unsqueeze(-2)  # exact: as if the factors had been scaled
    root, solved = _root(grams[..., 0, :, :] * both)
    squares, y = eigh(product(product(root.mT, grams[..., 1, :, :] / both), root))
    kept = squares > up.shape[-1] * torch.finfo(up.dtype).eps * squares[..., :1]
    s = torch.where(kept, squares, 0.0).sqrt()
    ours, theirs = signed(
        even.unsqueeze(-1) * solved(y) * kept.unsqueeze(-2),
        product(root, y) * _inverse(s, kept).unsqueeze(-2) / even.unsqueeze(-1),
    )
    return Core(ours, s, theirs.mT, grams)


def _evening(one: Tensor, two: Tensor) -> Tensor:
    """Powers of two (..., r) that make even what multiplies and divides two sides.

    `one` and `two` (..., r) are the squared norms of the columns of the first side, and of the
    rows of the second.
    """
    alive = (one > 0) & (two > 0)
    ratio = torch.where(alive, two, 1.0) / torch.where(alive, one, 1.0)
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).log2().div(4).round().exp2()


def _root(gram: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """b with b bᵀ = gram (..., r, r), and a function that applies its transposed pseudo-inverse.

    By Cholesky if gram is far from singular, else by eigenvectors, which take four times as long.
    Each member of a stack is decided by itself.
    """
    low, failed = each(torch.linalg.cholesky_ex, gram)
    pivots = low.diagonal(dim1=-2, dim2=-1)
    if not bool(failed.any()) and bool((pivots.amin(-1) > REGULAR * pivots.amax(-1)).all()):
        return low, lambda y: each(_solved, low, y)[0]
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("holds NaN or infinity")
    if one_by_one(gram) and gram[..., 0, 0].numel() > 1:
        return _roots(gram)
    values, vectors = eigh(gram)
    alive = values > gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., :1]
    h = values.sqrt()
    inverse = vectors * _inverse(h, alive).unsqueeze(-2)
    return vectors * h.unsqueeze(-2), lambda y: product(inverse, y)


def _roots(grams: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`_root` of each of a stack, by the way that it would take in a stack of one."""
    roots, solvers = zip(*(_root(gram.unsqueeze(0)) for (gram,) in members(grams)), strict=True)

    def solved(y: Tensor) -> Tensor:
        pairs = zip(solvers, members(y), strict=True)
        return torch.cat([solve(own.unsqueeze(0)) for solve, (own,) in pairs]).reshape(y.shape)

    return torch.cat(roots).reshape(grams.shape), solved


def _solved(low: Tensor, y: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(low.mT, y, upper=True)
    return solved


def _inverse(x: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, 1.0 / torch.where(alive, x, 1.0), 0.0)


def factored_svd(left: Tensor, right: Tensor) -> LowRank:
    """Exact SVD of left (..., m, r) · right (..., r, n), with k = r.

    Dead directions have σ = 0 and a zero row of vh. u, s, vh are in the compute dtype of both
    factors; the residual is 0.
    """
    dtype, wide = compute_dtype(left, right), torch.float64
    core = factored_core(left, right)
    ours, s, theirs = (t.to(left.device) for t in (core.left, core.s, core.right))
    u, v = signed(left.to(wide) @ ours, (theirs @ right.to(wide)).mT)
    zero = torch.zeros(s.shape[:-1], dtype=s.dtype, device=s.device)
    return LowRank(u.to(dtype), s.to(dtype), v.mT.to(dtype), zero)
