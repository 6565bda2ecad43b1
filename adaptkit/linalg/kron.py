"""Kronecker products: forming them, and the nearest one to a matrix (Van Loan and Pitsianis 1993)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from adaptkit.linalg.krylov import eigh, gram_columns
from adaptkit.linalg.lowrank import SvdSpec, truncated_svd
from adaptkit.linalg.precision import norm_squared, upcast

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Kron",
    "KronLowRank",
    "factorization",
    "kron",
    "nearest_kron",
    "nearest_kron_lowrank",
    "rearrange",
    "unarrange",
]

GRAM_SIDE = 256  # up to this many blocks (or entries a block) the Gram matrix is the cheapest way
SWEEP_TOL = 1e-5  # alternating least squares stops where the residual drops by less than this share


@dataclass(frozen=True)
class Kron:
    """X ≈ w1 ⊗ w2.   w1: (..., a, b)   w2: (..., c, d)   captured: (...,) = ‖X‖² − ‖X − w1 ⊗ w2‖², float64"""

    w1: Tensor
    w2: Tensor
    captured: Tensor


@dataclass(frozen=True)
class KronLowRank:
    """X ≈ w1 ⊗ (left · right).   w1: (..., a, b)   left: (..., c, r)   right: (..., r, d)   captured: (...,), float64"""

    w1: Tensor
    left: Tensor
    right: Tensor
    captured: Tensor


def factorization(dim: int, factor: int = -1) -> tuple[int, int]:
    """(small, large) with small · large = dim: how LoKr cuts a dimension.

    `factor` itself where it divides dim (the smaller of it and its cofactor first); otherwise the greatest divisor up to
    `factor` (any, for -1) that is no greater than its cofactor. The same function as LyCORIS'
    `functional/general.py: factorization`, which loaders use to guess the factor back.
    """
    if factor > 0 and dim % factor == 0:
        return min(factor, dim // factor), max(factor, dim // factor)
    limit = dim if factor < 0 else factor
    small = max(n for n in range(1, min(limit, math.isqrt(dim)) + 1) if dim % n == 0)
    return small, dim // small


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 (..., a, b) ⊗ w2 (..., c, d) → (..., a·c, b·d): block (i, j) is w1[i, j] · w2."""
    a, b = w1.shape[-2:]
    c, d = w2.shape[-2:]
    blocks = w1[..., :, None, :, None] * w2[..., None, :, None, :]
    return blocks.reshape(*blocks.shape[:-4], a * c, b * d)


def rearrange(x: Tensor, a: int, b: int) -> Tensor:
    """R(X): x (..., a·c, b·d) → (..., a·b, c·d), row i·b + j being block (i, j) flattened. One copy.

    ‖X − w1 ⊗ w2‖_F = ‖R(X) − vec(w1) vec(w2)ᵀ‖_F (Van Loan and Pitsianis 1993).
    """
    c, d = x.shape[-2] // a, x.shape[-1] // b
    blocks = x.reshape(*x.shape[:-2], a, c, b, d).transpose(-3, -2)
    return blocks.reshape(*x.shape[:-2], a * b, c * d)


def unarrange(r: Tensor, a: int, b: int, c: int, d: int) -> Tensor:
    """The inverse of `rearrange`: r (..., a·b, c·d) → (..., a·c, b·d)."""
    blocks = r.reshape(*r.shape[:-2], a, b, c, d).transpose(-3, -2)
    return blocks.reshape(*r.shape[:-2], a * c, b * d)


def nearest_kron(x: Tensor, a: int, b: int) -> Kron:
    """The nearest w1 (..., a, b) ⊗ w2 to x (..., a·c, b·d) in Frobenius norm.

    The leading singular pair of R(X), from the float64 Gram matrix of its smaller side, formed once: exact,
    deterministic, no iteration (power iteration stalls on the small gaps of real differences). rms(w1) = rms(w2), the
    largest entry of w1 is positive; a zero x gives w1 = e₁, w2 = 0.
    """
    x = upcast(x)
    if x.ndim > 2:
        return _each(x, lambda member: nearest_kron(member, a, b))
    c, d = x.shape[0] // a, x.shape[1] // b
    r = rearrange(x, a, b)
    left = _leading(r)
    if left is None:
        return Kron(_unit(x, a, b), x.new_zeros(c, d), norm_squared(x) * 0)
    right = left @ r
    captured = right.double().square().sum()
    w1, w2 = _gauged(left.reshape(a, b), right.reshape(c, d))
    return Kron(w1, w2, captured)


def _unit(x: Tensor, a: int, b: int) -> Tensor:
    w1 = x.new_zeros(a, b)
    w1[0, 0] = 1.0
    return w1


def _leading(r: Tensor) -> Tensor | None:
    """The leading left singular vector of r (p, q), unit length; None for a zero matrix."""
    p, q = r.shape
    if min(p, q) > GRAM_SIDE:
        svd = truncated_svd(r, SvdSpec(1, method="lanczos"))
        return None if float(svd.s[0]) == 0.0 else svd.u[:, 0].div(svd.u[:, 0].norm())
    values, vectors = eigh(gram_columns(r.mT if p <= q else r))
    if float(values[0]) <= 0.0:
        return None
    if p <= q:
        return vectors[:, 0].to(r.dtype)
    left: Tensor = r @ vectors[:, 0].to(r.dtype)
    return left.div_(left.norm())


def _gauged(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal root mean squares, the largest entry of w1 positive."""
    one, two = w1.square().mean().sqrt(), w2.square().mean().sqrt()
    ratio = (two / one).sqrt() if float(two) > 0 else one.new_ones(())
    top = w1.flatten()[w1.abs().argmax()]
    ratio = torch.where(top < 0, -ratio, ratio)
    return w1 * ratio, w2 / ratio


def nearest_kron_lowrank(x: Tensor, a: int, b: int, rank: int, sweeps: int = 10) -> KronLowRank:
    """The nearest w1 (..., a, b) ⊗ (left·right), rank of the second factor at most `rank`, to x (..., a·c, b·d).

    Starts from `nearest_kron`, truncated, then alternates exactly: the best low-rank second factor for w1, the best w1 for
    it. Captured energy never falls; no restart ever gained more than 3e-4 (reference §3.2). Balanced factors.
    """
    x = upcast(x)
    if x.ndim > 2:
        return _each(x, lambda member: nearest_kron_lowrank(member, a, b, rank, sweeps))
    c, d = x.shape[0] // a, x.shape[1] // b
    rank = min(rank, c, d)
    r = rearrange(x, a, b)
    w1 = _leading(r)
    if w1 is None:
        return KronLowRank(_unit(x, a, b), x.new_zeros(c, rank), x.new_zeros(rank, d), norm_squared(x) * 0)
    return _alternate(r, w1, (a, b, c, d), rank, sweeps)


def _alternate(r: Tensor, w1: Tensor, shape: tuple[int, int, int, int], rank: int, sweeps: int) -> KronLowRank:
    a, b, c, d = shape
    total = float(norm_squared(r))
    low = truncated_svd((w1 @ r).reshape(c, d), SvdSpec(rank))
    captured = float(low.s.double().square().sum())
    for _ in range(sweeps):
        better = r @ (low.u @ (low.s.unsqueeze(-1) * low.vh)).flatten()
        size = better.norm()
        if not bool(size > 0):
            break
        trial = better / size
        next_low = truncated_svd((trial @ r).reshape(c, d), SvdSpec(rank))
        gained = float(next_low.s.double().square().sum()) - captured
        if gained <= 0:
            break
        w1, low, captured = trial, next_low, captured + gained
        if gained < SWEEP_TOL * max(total - captured, 1e-30 * total):
            break
    left, right = low.balanced()
    small, scaled = _gauged(w1.reshape(a, b), left)
    # three balanced factors: what w1 took from `left` is shared with `right`
    return KronLowRank(*_three(small, scaled, right), torch.tensor(captured, dtype=torch.float64, device=r.device))


def _three(w1: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same triple product with left and right of equal norm (w1 keeps its share)."""
    one, two = left.norm(), right.norm()
    if not (bool(one > 0) and bool(two > 0)):
        return w1, left, right
    ratio = (two / one).sqrt()
    return w1, left * ratio, right / ratio


K = TypeVar("K", Kron, KronLowRank)


def _each(x: Tensor, fit: Callable[[Tensor], K]) -> K:
    """`fit` on every member of a batch, stacked again."""
    batch = x.shape[:-2]
    members = [fit(member) for member in x.reshape(-1, *x.shape[-2:])]
    found = {f.name: torch.stack([getattr(one, f.name) for one in members]) for f in fields(members[0])}
    return type(members[0])(**{name: whole.reshape(*batch, *whole.shape[1:]) for name, whole in found.items()})
