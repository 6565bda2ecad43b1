"""The nearest Kronecker product to a matrix, its second factor of low rank."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from adaptkit.linalg.kron.alternating import (
    PACES,
    ROUNDING,
    STARTS,
    SWEEP_TOL,
    nearest_of_stack,
)
from adaptkit.linalg.kron.blocks import rearrange
from adaptkit.linalg.kron.nearest import each_member, folded, leading_rows, rescaled
from adaptkit.linalg.lowrank import LowRank, SvdSpec, energies, truncated_svd
from adaptkit.linalg.precision import norm_squared, one_by_one, scaled, upcast

__all__ = ["KronLowRank", "nearest_kron_lowrank"]

NEAR = 0.95  # of the energy that the best start captures: one of less is not followed
LITTLE = (
    0.01  # of ‖X‖²: what the best two starts capture then differs by 0.1 % of the error at most
)
ROUGH = 1e-2  # relative excess of the errors by which starts are compared
SWEEPS = 200  # at most; rarely more than 50


@dataclass(frozen=True)
class KronLowRank:
    """X ≈ w1 ⊗ (left · right).

    w1: (..., a, b)   left: (..., c, r)   right: (..., r, d)   captured: (...,), float64
    """

    w1: Tensor
    left: Tensor
    right: Tensor
    captured: Tensor


def nearest_kron_lowrank(x: Tensor, a: int, b: int, rank: int, sweeps: int = SWEEPS) -> KronLowRank:
    """The nearest w1 (..., a, b) ⊗ (left·right) of rank at most `rank` to x (..., a·c, b·d).

    Alternates the best low-rank second factor for w1 and the best w1 for it. Both steps are exact,
    so captured energy never falls. It starts from the four leading singular vectors of R(X), and
    goes on from each that captures nearly as much as the best of them: the first one alone ends up
    to 0.4 % above the least error. Within 0.1 % of the best of 20 random restarts on 82 of 83
    matrices, noise among them, within 0.2 % on the other (measured). The three factors have equal
    root mean squares and are in the compute dtype of x.
    """
    x = upcast(x)
    if one_by_one(x):
        return each_member(x, lambda member: nearest_kron_lowrank(member, a, b, rank, sweeps))
    c, d = x.shape[-2] // a, x.shape[-1] // b
    if x.ndim > 2 and x.numel():
        return _lowrank_at_once(x, a, b, rank)
    x, unit = scaled(x)
    r = rearrange(x, a, b)
    w1, low, captured = _alternate(
        r, leading_rows(r, STARTS), (c, d), SvdSpec(min(rank, c, d)), sweeps
    )
    first, left, right = rescaled(_evened(folded(w1, a, b), *low.balanced()), unit)
    whole = captured if unit is None else captured * unit.square()
    return KronLowRank(first, left, right, whole)


def _lowrank_at_once(x: Tensor, a: int, b: int, rank: int) -> KronLowRank:
    """`nearest_kron_lowrank` of stacks on accelerators; odd members by themselves."""
    flat = x.reshape(-1, *x.shape[-2:])
    shape = x.shape[-2] // a, x.shape[-1] // b
    w1, left, right, captured, good = nearest_of_stack(rearrange(flat, a, b), shape, rank)
    found = KronLowRank(folded(w1, a, b), left, right, captured.to(x.device))
    for n, plain in enumerate(good):
        if not plain:
            one = nearest_kron_lowrank(flat[n], a, b, rank)
            for f in fields(one):
                getattr(found, f.name)[n] = getattr(one, f.name)
    whole = {f.name: getattr(found, f.name) for f in fields(found)}
    return KronLowRank(
        **{name: t.reshape(*x.shape[:-2], *t.shape[1:]) for name, t in whole.items()}
    )


# starts (..., k, p), their second factors (..., k, ·, ·), and the captured energies (..., k)
_Tries = tuple[Tensor, LowRank, Tensor]


def _alternate(
    r: Tensor, starts: Tensor, shape: tuple[int, int], spec: SvdSpec, sweeps: int
) -> _Tries:
    """Alternating least squares on r (..., p, q) from the best of `starts` (..., k, p).

    Returns w1 (..., p), the second factor (..., c, d) and the captured energy (...,).
    """
    total = norm_squared(r).unsqueeze(-1)
    near = _near(r, starts, shape, spec, total)
    if r.ndim > 2:
        tries = _climbed(r, total, (starts, *_second(r, starts, shape, spec)), near, spec, sweeps)
    else:  # one by one, so that none waits for another
        each = []
        for start in starts[near].unsqueeze(1):
            one = start, *_second(r, start, shape, spec)
            each.append(_climbed(r, total, one, one[2] >= 0, spec, sweeps))
        tries = max(each, key=lambda one: float(one[2]))
    w1, low, captured = tries
    best = captured.argmax(-1, keepdim=True)

    def taken(x: Tensor, inner: int) -> Tensor:
        index = best[(..., *(None,) * inner)]
        return torch.take_along_dim(x, index, -1 - inner).squeeze(-1 - inner)

    chosen = LowRank(taken(low.u, 2), taken(low.s, 1), taken(low.vh, 2), taken(low.residual, 0))
    return taken(w1, 1), chosen, taken(captured, 0)


def _near(
    r: Tensor, starts: Tensor, shape: tuple[int, int], spec: SvdSpec, total: Tensor
) -> Tensor:
    """Which of `starts` (..., k, p) to go on from, (..., k).

    Those whose second factor captures nearly as much as the best of them, or only the first one
    if that captures too little of `total` (..., 1) for a choice to matter.
    """
    rough = replace(spec, tol=ROUGH)

    def score(starts: Tensor) -> Tensor:
        products = starts @ r
        products = products.reshape(*products.shape[:-1], *shape)
        return energies(products, spec.rank, rough).sum(-1)

    first = torch.zeros(starts.shape[:-1], dtype=torch.bool, device=r.device)
    first[..., :1] = True
    if starts.shape[-2] == 1:
        return first
    scores = score(starts[..., :1, :])
    worth = scores > LITTLE * total
    if not bool(worth.any()):
        return first
    scores = torch.cat([scores, score(starts[..., 1:, :])], -1)
    return torch.where(worth, scores >= NEAR * scores.amax(-1, keepdim=True), first)


def _climbed(
    r: Tensor, total: Tensor, tries: _Tries, active: Tensor, spec: SvdSpec, sweeps: int
) -> _Tries:
    """Sweep each try that is active (..., k), until what it would still gain is negligible.

    That is extrapolated from its last two gains: near a saddle they grow, and behind it they shrink
    only slowly. `total` is ‖r‖² (..., 1).
    """
    w1, low, captured = tries
    shape, before = (low.u.shape[-2], low.vh.shape[-1]), torch.zeros_like(captured)
    for _ in range(sweeps):
        second = low.u @ (low.s.unsqueeze(-1) * low.vh)
        # for a fixed second factor the best w1 is R vec(w2), normalised
        better = (r @ second.flatten(-2).mT).mT
        trial = better / better.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(better.dtype).tiny)
        found, energy = _second(r, trial, shape, spec)
        gained = energy - captured
        # exact steps cannot lose energy; rounding at convergence can
        accepted = active & (gained > 0)
        w1 = torch.where(accepted.unsqueeze(-1), trial, w1)
        low = _chosen(accepted, found, low)
        captured = torch.where(accepted, energy, captured)
        pace = torch.where(before > 0, gained / before, PACES[1]).clamp(*PACES)
        promised = gained * pace / (1 - pace) > 2 * SWEEP_TOL * (total - captured)
        growing = (gained > before) & (gained > ROUNDING * captured)
        active, before = accepted & (promised | growing), gained
        if not bool(active.any()):
            break
    return w1, low, captured


def _second(r: Tensor, w1: Tensor, shape: tuple[int, int], spec: SvdSpec) -> tuple[LowRank, Tensor]:
    """The best low-rank second factors for w1 (..., k, p), and the captured energies of both."""
    products = w1 @ r
    low = truncated_svd(products.reshape(*products.shape[:-1], *shape), spec)
    return low, low.s.to(low.residual.dtype).square().sum(-1)


def _chosen(mask: Tensor, one: LowRank, two: LowRank) -> LowRank:
    """Select `one` if the mask holds, else `two`, member by member."""
    matrix, vector = mask[..., None, None], mask[..., None]
    return LowRank(
        torch.where(matrix, one.u, two.u),
        torch.where(vector, one.s, two.s),
        torch.where(matrix, one.vh, two.vh),
        torch.where(mask, one.residual, two.residual),
    )


def _evened(w1: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale to equal root mean squares, with the largest entry of w1 positive; same product.

    Unscaled if a factor is zero.
    """
    sizes = torch.stack([t.square().mean((-2, -1), keepdim=True).sqrt() for t in (w1, left, right)])
    alive = (sizes > 0).all(0)
    logs = torch.where(alive, sizes, 1.0).log()
    scales = (logs.mean(0) - logs).exp()
    flat = w1.flatten(-2)
    top = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).unsqueeze(-1)
    sign = torch.where(top < 0, -1.0, 1.0).to(w1.dtype)
    return w1 * (sign * scales[0]), left * (sign * scales[1]), right * scales[2]
