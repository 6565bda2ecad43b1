"""Kronecker products: forming them, and the nearest one to a matrix (Van Loan and Pitsianis 1993)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg.krylov import eigh, gram_columns
from adaptkit.linalg.lowrank import LowRank, SvdSpec, truncated_svd
from adaptkit.linalg.precision import empty, norm_squared, upcast, works_on_stacks

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Kron",
    "KronLowRank",
    "factorization",
    "kron",
    "leading_kron",
    "nearest_kron",
    "nearest_kron_lowrank",
    "rearrange",
]

GRAM_SIDE = 256  # up to this many blocks (or entries a block) the Gram matrix is the cheapest way
LEADING_TOL = 1e-5  # of the whole error: a product often captures 1 % of ‖X‖², and 1e-3 would lose a twentieth of that
STACK_RANK = 8  # what a stack of fixed size looks for to get the first vector as well: 0.1 % lost on noise, 2 % with 1
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

    ‖X − w1 ⊗ w2‖_F = ‖R(X) − vec(w1) vec(w2)ᵀ‖_F (Van Loan and Pitsianis 1993). ShapeMismatch where a or b does not divide.
    """
    if x.shape[-2] % a or x.shape[-1] % b:
        raise ShapeMismatch(f"{x.shape[-2]} × {x.shape[-1]} does not divide into {a} × {b} blocks")
    c, d = x.shape[-2] // a, x.shape[-1] // b
    whole = empty((*x.shape[:-2], a * b, c * d), x.dtype, x.device)
    whole.view(*x.shape[:-2], a, b, c, d).copy_(
        x.reshape(*x.shape[:-2], a, c, b, d).transpose(-3, -2)
    )
    return whole


def nearest_kron(x: Tensor, a: int, b: int) -> Kron:
    """The nearest w1 (..., a, b) ⊗ w2 to x (..., a·c, b·d) in Frobenius norm.

    The leading singular pair of R(X), from the float64 Gram matrix of its smaller side, formed once: exact,
    deterministic, no iteration (power iteration stalls on the small gaps of real differences). Where both sides of R
    exceed 256, by block Lanczos: captured within 0.3 % of the optimum on white noise, the worst case. rms(w1) = rms(w2),
    the largest entry of w1 is positive; a zero x gives w1 = e₁, w2 = 0. Factors in the compute dtype of x. Stacks are
    computed together on CUDA, one by one elsewhere.
    """
    x = upcast(x)
    if _apart(x):
        return _each(x, lambda member: nearest_kron(member, a, b))
    c, d = x.shape[-2] // a, x.shape[-1] // b
    r = rearrange(x, a, b)
    left = _leading(r)
    right = (left.unsqueeze(-2) @ r).squeeze(-2)
    captured = norm_squared(right.unsqueeze(-2))
    return Kron(*_gauged(_folded(left, a, b), _folded(right, c, d)), captured)


def _folded(x: Tensor, rows: int, columns: int) -> Tensor:
    """(..., rows·columns) → (..., rows, columns)."""
    return x.reshape(*x.shape[:-1], rows, columns)


def _apart(x: Tensor) -> bool:
    """Whether a stack is better taken one by one: so that results cannot depend on it."""
    return x.ndim > 2 and not works_on_stacks(x.device)


def _leading(r: Tensor) -> Tensor:
    """The leading left singular vector of r (..., p, q), (..., p), unit length; e₁ for a zero matrix."""
    p, q = r.shape[-2:]
    if min(p, q) > GRAM_SIDE:
        spec = SvdSpec(STACK_RANK if r.ndim > 2 else 1, method="lanczos", tol=LEADING_TOL)
        found = truncated_svd(r, spec).u[..., 0]
    else:
        vector = eigh(gram_columns(r.mT if p <= q else r))[1][..., :1].to(r.dtype)
        found = (vector if p <= q else r @ vector).squeeze(-1)
    size = found.norm(dim=-1, keepdim=True)
    unit = torch.zeros_like(found)
    unit[..., 0] = 1.0
    # the Gram matrix of a zero matrix has unit eigenvectors like any other, the last one first
    dead = (size == 0) | ~torch.isfinite(size) | ~r.any(-1).any(-1, keepdim=True)
    return torch.where(dead, unit, found / torch.where(dead, 1.0, size))


def _gauged(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal root mean squares, the largest entry of w1 positive."""
    one, two = (w.square().mean((-2, -1), keepdim=True).sqrt() for w in (w1, w2))
    ratio = torch.where(two > 0, (two / one).sqrt(), 1.0)
    flat = w1.flatten(-2)
    top = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).unsqueeze(-1)
    ratio = torch.where(top < 0, -ratio, ratio)
    return w1 * ratio, w2 / ratio


def nearest_kron_lowrank(x: Tensor, a: int, b: int, rank: int, sweeps: int = 10) -> KronLowRank:
    """The nearest w1 (..., a, b) ⊗ (left·right), rank of the second factor at most `rank`, to x (..., a·c, b·d).

    Starts from `nearest_kron`, truncated, then alternates exactly: the best low-rank second factor for w1, the best w1 for
    it. Captured energy never falls; no restart ever gained more than 3e-4 (reference §3.2). Equal root mean squares of all
    three factors (reference §3.5), in the compute dtype of x.
    """
    x = upcast(x)
    if _apart(x):
        return _each(x, lambda member: nearest_kron_lowrank(member, a, b, rank, sweeps))
    c, d = x.shape[-2] // a, x.shape[-1] // b
    r = rearrange(x, a, b)
    w1, low, captured = _alternate(r, _leading(r), (c, d), SvdSpec(min(rank, c, d)), sweeps)
    return KronLowRank(*_evened(_folded(w1, a, b), *low.balanced()), captured)


def _alternate(
    r: Tensor, w1: Tensor, shape: tuple[int, int], spec: SvdSpec, sweeps: int
) -> tuple[Tensor, LowRank, Tensor]:
    """Alternating least squares on r (..., a·b, c·d) from w1 (..., a·b): w1, the second factor, the energy captured.

    Each member of a stack stops by itself: where a sweep gains less than 1e-5 of the residual.
    """
    total = norm_squared(r)
    low, captured = _second(r, w1, shape, spec)
    active = torch.ones_like(captured, dtype=torch.bool)
    for _ in range(sweeps):
        better = (r @ (low.u @ (low.s.unsqueeze(-1) * low.vh)).flatten(-2).unsqueeze(-1)).squeeze(
            -1
        )
        trial = better / better.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(better.dtype).tiny)
        found, energy = _second(r, trial, shape, spec)
        gained = energy - captured
        accepted = active & (gained > 0)
        w1 = torch.where(accepted.unsqueeze(-1), trial, w1)
        low = _chosen(accepted, found, low)
        captured = torch.where(accepted, energy, captured)
        active = accepted & (gained >= SWEEP_TOL * (total - captured))
        if not bool(active.any()):
            break
    return w1, low, captured


def _second(r: Tensor, w1: Tensor, shape: tuple[int, int], spec: SvdSpec) -> tuple[LowRank, Tensor]:
    """The best low-rank second factor for w1, and the energy the two capture."""
    low = truncated_svd((w1.unsqueeze(-2) @ r).squeeze(-2).reshape(*r.shape[:-2], *shape), spec)
    return low, low.s.to(low.residual.dtype).square().sum(-1)


def _chosen(mask: Tensor, one: LowRank, two: LowRank) -> LowRank:
    """Member by member, `one` where the mask holds, else `two`."""
    matrix, vector = mask[..., None, None], mask[..., None]
    return LowRank(
        torch.where(matrix, one.u, two.u),
        torch.where(vector, one.s, two.s),
        torch.where(matrix, one.vh, two.vh),
        torch.where(mask, one.residual, two.residual),
    )


def _evened(w1: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same triple product with equal root mean squares, the largest entry of w1 positive; unscaled where one is 0."""
    sizes = torch.stack([t.square().mean((-2, -1), keepdim=True).sqrt() for t in (w1, left, right)])
    alive = (sizes > 0).all(0)
    logs = torch.where(alive, sizes, 1.0).log()
    scales = (logs.mean(0) - logs).exp()
    flat = w1.flatten(-2)
    top = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).unsqueeze(-1)
    sign = torch.where(top < 0, -1.0, 1.0).to(w1.dtype)
    return w1 * (sign * scales[0]), left * (sign * scales[1]), right * scales[2]


K = TypeVar("K", Kron, KronLowRank)


def _each(x: Tensor, fit: Callable[[Tensor], K]) -> K:
    """`fit` on every member of a batch, stacked again; an empty batch gives empty stacks of the same shapes."""
    batch, flat = x.shape[:-2], x.flatten(0, -3)
    members = [fit(member) for member in flat] or [fit(x.new_zeros(x.shape[-2:]))]
    found = {
        f.name: torch.stack([getattr(one, f.name) for one in members])[: len(flat)]
        for f in fields(members[0])
    }
    return type(members[0])(
        **{name: whole.reshape(*batch, *whole.shape[1:]) for name, whole in found.items()}
    )


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
