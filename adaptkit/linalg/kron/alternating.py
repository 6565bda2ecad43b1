"""The nearest w1 ⊗ (left · right) of stacks on accelerators: a few sweeps, then one look.

The rows of R are the blocks of X, see `blocks`. For w1 = w, the second factor is M = wᵀR as a
matrix. A sweep takes half a step of subspace iteration on M, then the best w for what that gives:
no step can lose energy. All starts are swept at once, and the host chooses among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.hosted import fetched, on_host, stacked
from adaptkit.linalg.kron.blocks import GRAM_SIDE
from adaptkit.linalg.krylov import gram_columns
from adaptkit.linalg.lowrank import SvdSpec, truncated_svd
from adaptkit.linalg.stacks import TINY

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PACES", "ROUNDING", "STARTS", "SWEEP_TOL", "Fit", "nearest_of_stack"]

STARTS = 4  # singular vectors that alternating least squares may start from
SWEEP_TOL = 1e-4  # of the error: alternating least squares stops if it would fall by less
# the ratio of two gains in a row, as far as it is believed
PACES = 0.3, 0.95
ROUNDING = 1e-6  # of the captured energy: a smaller gain is the rounding of float32
# sweeps between two looks: after four, the errors of six kinds of matrices were below those of
# single ones, which sweep from the best start until that gains little
AT_ONCE = 4
LOOKS = 50  # at most


class Fit(NamedTuple):
    """w1 (B, p), left (B, c, k) and right (B, k, d), of equal root mean squares.

    captured: (B,), float64, on the host   good: False for members to be fitted singly
    """

    w1: Tensor
    left: Tensor
    right: Tensor
    captured: Tensor
    good: list[bool]


class _Stack(NamedTuple):
    """r (B, p, c·d) over its largest singular value, and on the host that and ‖r‖², (B,)."""

    r: Tensor
    shape: tuple[int, int]
    size: Tensor
    total: Tensor

    def some(self, members: list[int], index: Tensor) -> _Stack:
        r = self.r.index_select(0, index)
        return _Stack(r, self.shape, self.size[members], self.total[members])


class _Tries(NamedTuple):
    """w (B, t, p), orthonormal q (B, t, c, k), and z = Mᵀq (B, t, d, k)."""

    w: Tensor
    q: Tensor
    z: Tensor


class _Seen(NamedTuple):
    """Of the last three sweeps, on the host: ‖z's columns‖ (B, 3, t, k), and w (B, 3, t, p)."""

    columns: Tensor
    w: Tensor

    @property
    def captured(self) -> Tensor:
        """What each try captures, (B, 3, t)."""
        size = self.w.square().sum(-1)
        return self.columns.square().sum(-1) / torch.where(size > 0, size, 1.0)


def nearest_of_stack(r: Tensor, shape: tuple[int, int], rank: int) -> Fit:
    """The nearest w1 ⊗ (left · right) of rank at most `rank`; r (B, p, c·d) is overwritten."""
    if shape[1] > shape[0]:
        turned = r.reshape(*r.shape[:2], *shape).mT.reshape(r.shape)
        found = nearest_of_stack(turned, (shape[1], shape[0]), rank)
        return found._replace(left=found.right.mT, right=found.left.mT)
    starts, size, total = _starts(r)
    r.mul_(size.reciprocal().to(r.dtype).to(r.device)[:, None, None])
    stack = _Stack(r, shape, size, total / size.square())
    return _together(_swept(stack, starts, min(rank, *shape)))


def _starts(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left singular vectors (B, t, p), and on the host σ₁ (1 for zero) and ‖r‖², (B,)."""
    count = min(STARTS, *r.shape[-2:])
    if r.shape[-2] > GRAM_SIDE:
        low = truncated_svd(r, SvdSpec(2 * STARTS, method="lanczos"))
        s, rest = fetched(low.s, low.residual)
        vectors, size, total = low.u[..., :count].mT, s[:, 0], rest + s.square().sum(-1)
    else:
        (gram,) = fetched(gram_columns(r.mT))
        found = stacked(on_host(lambda one: _top(one, count), gram))
        vectors, size = found[0].mT.to(r.dtype).to(r.device), found[1]
        total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return vectors, torch.where(size > 0, size, 1.0), total


def _top(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (p, count) of a Gram matrix, and the largest singular value ()."""
    values, vectors = torch.linalg.eigh(torch.nan_to_num(gram, 0.0, 0.0, 0.0))
    return vectors.flip(-1)[:, :count], values[-1].clamp_min(0.0).sqrt()


def _leading_right(m: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors (B, t, d, k) of m (B, t, c, d), d ≤ c."""
    if m.shape[-1] > GRAM_SIDE:
        return truncated_svd(m, SvdSpec(rank)).vh.mT
    (gram,) = fetched(gram_columns(m.flatten(0, 1)))
    found = stacked(on_host(lambda one: _top(one, rank), gram))[0].to(m.dtype).to(m.device)
    whole: Tensor = found.reshape(*m.shape[:2], *found.shape[1:])
    return whole


def _orthonormal(x: Tensor, least: Tensor) -> Tensor:
    """Orthonormalise the columns of x (B, t, c, k) by Cholesky's factor of their Gram matrix.

    `least` (k, k) keeps that of zero columns definite.
    """
    wide = x.to(torch.float64).flatten(0, 1)
    gram = torch.baddbmm(least, wide.mT, wide)
    # without a check, which would wait: what fails is not finite, and the host sees that
    factor = torch.linalg.cholesky_ex(gram)[0]
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False)
    return solved.to(x.dtype).reshape(x.shape)


def _swept(stack: _Stack, w: Tensor, rank: int) -> list[_Part]:
    """Sweep each member until the host sees that it gains little; what is done leaves the stack."""
    members, found = list(range(len(w))), list[_Part]()
    tries: _Tries | None = None
    for look in range(1, LOOKS + 1):
        tries, seen = _some_sweeps(stack, tries, w, rank)
        best = torch.nan_to_num(seen.captured[:, -1], -1.0).argmax(-1)
        last = seen.captured[torch.arange(len(best)), :, best].tolist()
        gains = [
            still_gains(two - one, three - two, three, whole)
            for (one, two, three), whole in zip(last, stack.total.tolist(), strict=True)
        ]
        left = [n for n, gain in enumerate(gains) if gain and look < LOOKS]
        done = [n for n in range(len(gains)) if n not in left]
        if done:
            own = [members[n] for n in done]
            found.append(_finished(own, done, best[done], stack.size[done], tries, seen))
        if not left:
            break
        members, index = [members[n] for n in left], torch.tensor(left).to(w.device)
        # scaled anew, as w becomes smaller with every sweep
        sizes = seen.columns[left, -1].norm(dim=-1)[..., None, None]
        unit = torch.where(sizes > 0, sizes, 1.0).reciprocal().to(w.dtype).to(w.device)
        q, z = (part.index_select(0, index) for part in (tries.q, tries.z))
        stack, tries = stack.some(left, index), _Tries(w, q, z.mul_(unit))
    return found


def still_gains(before: float, gained: float, captured: float, total: float) -> bool:
    """Whether another sweep is worth it, by the last two gains and what is captured of `total`.

    Extrapolated: near a saddle the gains grow, and behind it they shrink only slowly.
    """
    pace = min(PACES[1], max(PACES[0], gained / before if before > 0 else PACES[1]))
    promised = gained * pace / (1 - pace) > 2 * SWEEP_TOL * (total - captured)
    return gained > 0 and (promised or (gained > before and gained > ROUNDING * captured))


def _some_sweeps(stack: _Stack, tries: _Tries | None, w: Tensor, rank: int) -> tuple[_Tries, _Seen]:
    """Go on from `tries`, or begin with w (B, t, p)."""
    columns, ws = list[Tensor](), list[Tensor]()
    least = torch.eye(rank, dtype=torch.float64).mul_(TINY).to(w.device)
    for _ in range(AT_ONCE):
        if tries is not None:
            w = (tries.q @ tries.z.mT).flatten(-2) @ stack.r.mT
        product = w @ stack.r
        m = product.reshape(*product.shape[:-1], *stack.shape)
        q = _orthonormal(m @ (_leading_right(m, rank) if tries is None else tries.z), least)
        tries = _Tries(w, q, m.mT @ q)
        columns.append(torch.linalg.vector_norm(tries.z, dim=-2))
        ws.append(w)
    assert tries is not None
    (numbers,) = fetched(torch.cat([*columns[-3:], *ws[-3:]], -1))
    wide = torch.split(numbers, [rank] * 3 + [w.shape[-1]] * 3, -1)
    return tries, _Seen(torch.stack(wide[:3], 1), torch.stack(wide[3:], 1))


class _Part(NamedTuple):
    """What some members have become, as in `Fit`; `good` (B,) bool."""

    members: list[int]
    factors: tuple[Tensor, Tensor, Tensor]
    captured: Tensor
    good: Tensor


def _finished(
    members: list[int], places: list[int], best: Tensor, size: Tensor, tries: _Tries, seen: _Seen
) -> _Part:
    """The best try of each, the largest entry of w1 positive; e₁ if it is zero."""
    w, columns = seen.w[places, -1, best], seen.columns[places, -1, best]
    length = w.norm(dim=-1, keepdim=True)
    alive, length = length > 0, torch.where(length > 0, length, 1.0)
    w = torch.where(alive, w / length, torch.eye(1, w.shape[-1], dtype=w.dtype))
    sign = w.gather(-1, w.abs().argmax(-1, keepdim=True)).sign()
    sigma = columns / length
    root = sigma.sqrt()
    # q √σ and z / (‖w‖ √σ) both have ‖·‖² = Σσ, and r was divided by its size
    (c, k), d, whole = tries.q.shape[-2:], tries.z.shape[-2], sigma.sum(-1, keepdim=True)
    squares = torch.cat(
        [torch.ones_like(whole) / w.shape[-1], whole / (c * k), whole / (d * k)], -1
    )
    logs = torch.where((squares > 0).all(-1, keepdim=True), squares, 1.0).log() / 2
    even = (logs.mean(-1, keepdim=True) - logs).exp() * size.unsqueeze(-1).pow(1 / 3)
    inverse = torch.where(root > 0, root, 1.0).reciprocal() / length
    scales = [w * even[:, :1] * sign, root * even[:, 1:2] * sign, inverse * even[:, 2:]]
    sent = torch.cat(scales, -1)
    there = sent.to(tries.q.dtype).to(tries.q.device)
    w1, left, right = torch.split(there, [w.shape[-1], k, k], -1)
    index = (torch.tensor(places) * tries.q.shape[1] + best).to(tries.q.device)
    q, z = (part.flatten(0, 1).index_select(0, index) for part in (tries.q, tries.z))
    factors = w1, q.mul_(left.unsqueeze(-2)), z.mul_(right.unsqueeze(-2)).mT
    captured = sigma.square().sum(-1) * size.square()
    return _Part(members, factors, captured, torch.isfinite(sent).all(-1))


def _together(found: Sequence[_Part]) -> Fit:
    order = torch.tensor([n for part in found for n in part.members]).argsort()
    captured = torch.cat([part.captured for part in found])[order]
    good = torch.cat([part.good for part in found])[order]
    if len(found) == 1:
        return Fit(*found[0].factors, captured, good.tolist())
    index = order.to(found[0].factors[0].device)
    parts = zip(*(part.factors for part in found), strict=True)
    w1, left, right = (torch.cat(each).index_select(0, index) for each in parts)
    return Fit(w1, left, right, captured, good.tolist())
