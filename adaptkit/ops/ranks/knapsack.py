"""Multiple-choice knapsack: one option of every module, least error within bytes or the reverse.

Each option has a size in bytes and a squared error. The lower convex hulls of all modules, merged
by slope, give the optimum of the linear relaxation (Sinha and Zoltners 1979), which is also the
Lagrangian optimum (Shoham and Gersho 1988), and with it a bound. A whole choice is less than one
step of one module away from it. Few options could still close that gap; they are tried together
(Pisinger 1995, the core of the problem), exactly if they are few enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from adaptkit.errors import NonFinite, NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]
    Measure = Callable[[Sequence[int]], int]

__all__ = ["Allocation", "RankCurve", "least_bytes", "least_error"]


CORE = 64  # modules that an exchange may involve
STATES = 1 << 18  # partial exchanges tried in all: 30 ms


@dataclass(frozen=True, slots=True)
class RankCurve:
    """What a policy knows of one module: ‖ΔW‖² is `norm`, of which rank k captures the first k of `energies`.

    `energies` are σᵢ², descending; they may sum to less than `norm`. `sizes[k]` is what the module takes in the file at
    rank k, in bytes, for k = 0 … len(energies): ascending, by steps of any height.
    """

    energies: Sequence[float]
    norm: float
    sizes: Sequence[int]
    convolution: bool = False

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.energies) + 1:
            raise ValueError(
                f"{len(self.energies)} energies need one more size, not {len(self.sizes)}"
            )

    def errors(self) -> list[float]:
        """‖ΔW − ΔW_k‖² for k = 0 … len(energies), summed from the tail so that small ones keep their digits."""
        return tail_sums(self.energies, max(self.norm - math.fsum(self.energies), 0.0))


def tail_sums(values: Sequence[float], rest: float = 0.0) -> list[float]:
    """`rest` and the sum of values[k:], for k = 0 … len(values)."""
    return list(accumulate(reversed(values), initial=rest))[::-1]


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option of every module: its index, the sums of bytes and of (squared) errors.

    `bound` is below what any choice reaches of the sum that was to be least: the linear relaxation.
    """

    chosen: list[int]
    bytes: int
    error: float
    bound: float


def least_error(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> Allocation:
    """One of the (bytes, squared error) of every module: the least error in at most `budget` bytes.

    Options stand in any order and need no regular steps. NotRepresentable where even the smallest exceed the budget.
    """
    table = _listed(options)
    front = frontier(table, table.bytes, table.error)
    if front.least > budget:
        raise NotRepresentable(
            f"the least that can be chosen takes {front.least:.0f} bytes, more than {budget}"
        )
    picks, bound = solve(front, floored(budget, front.least, grain(front, front.resource)))
    return table.allocation(front.where[picks], bound)


def least_bytes(options: Sequence[Sequence[tuple[int, float]]], error: float) -> Allocation:
    """One of the (bytes, squared error) of every module: the fewest bytes with at most `error` in sum.

    NotRepresentable where even the most faithful options exceed the error.
    """
    table = _listed(options)
    front = frontier(table, table.error, table.bytes)
    if front.least > error:
        raise NotRepresentable(
            f"the least squared error that can be chosen is {front.least:g}, more than {error:g}"
        )
    picks, bound = solve(front, error, grain(front, front.value))
    return table.allocation(front.where[picks], bound)


@dataclass(frozen=True, slots=True)
class _Options:
    """The options of all modules end to end: bytes and error (n,), `first` (modules + 1,) where each module begins."""

    first: Indices
    bytes: Floats
    error: Floats

    def chosen(self, picks: Indices) -> list[int]:
        """Indices within each module."""
        found: list[int] = (picks - self.first[:-1]).tolist()
        return found

    def allocation(self, picks: Indices, bound: float) -> Allocation:
        """What this choice comes to."""
        total, error = int(math.fsum(self.bytes[picks])), math.fsum(self.error[picks])
        return Allocation(self.chosen(picks), total, error, bound)


def _listed(options: Sequence[Sequence[tuple[int, float]]]) -> _Options:
    import numpy as np

    flat = np.fromiter(chain.from_iterable(chain.from_iterable(options)), np.float64).reshape(-1, 2)
    return _options([len(one) for one in options], flat[:, 0], flat[:, 1])


def ranked(modules: Sequence[RankCurve]) -> _Options:
    """The ranks of all modules as options."""
    import numpy as np

    sizes = np.fromiter(chain.from_iterable(m.sizes for m in modules), np.float64)
    errors = np.fromiter(chain.from_iterable(m.errors() for m in modules), np.float64)
    return _options([len(m.sizes) for m in modules], sizes, errors)


def _options(counts: list[int], sizes: Floats, errors: Floats) -> _Options:
    import numpy as np

    if not all(counts):
        raise ValueError("a module without options")
    if not np.isfinite(errors).all():
        raise NonFinite("a module's energies are not finite")
    return _Options(np.cumsum([0, *counts]), sizes, errors)


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The options worth a thought: resource ascending and value descending within each module, shape (n,).

    `begin` (modules,) is where each module's begin, `least` what these take of the resource. `where` (n,) are indices of
    the options. The steps along the hulls, all modules together, the best value for the resource first: `stop` (s,) is
    the option each leads to, `cost` (s,) its resource, `slope` (s,) the value it saves for each unit of that.
    """

    owner: Indices
    resource: Floats
    value: Floats
    where: Indices
    begin: Indices
    least: float
    stop: Indices
    cost: Floats
    slope: Floats


def frontier(options: _Options, resource: Floats, value: Floats) -> _Frontier:
    import numpy as np

    modules = len(options.first) - 1
    owner = np.repeat(np.arange(modules), np.diff(options.first))
    order = np.lexsort((value, resource, owner))
    places = np.empty_like(order)
    places[np.argsort(value[order], kind="stable")] = np.arange(len(order))
    # a running minimum that starts anew with each module: all places of one lie below those of the one before
    where = order[_drops(places - owner[order] * len(order))]
    owner, resource, value = owner[where], resource[where], value[where]
    begin = np.searchsorted(owner, np.arange(modules))
    hull = _hull(owner, resource, value)
    same = owner[hull[1:]] == owner[hull[:-1]]
    start, stop = hull[:-1][same], hull[1:][same]
    cost = resource[stop] - resource[start]
    slope = (value[start] - value[stop]) / cost
    best = np.argsort(-slope, kind="stable")
    least = math.fsum(resource[begin])
    return _Frontier(
        owner, resource, value, where, begin, least, stop[best], cost[best], slope[best]
    )


def _drops(values: NDArray[np.float64] | Indices) -> NDArray[np.bool_]:
    """Which values are below all before them."""
    import numpy as np

    lowest = np.minimum.accumulate(values)
    return np.concatenate((np.ones(min(len(values), 1), bool), values[1:] < lowest[:-1]))


def _hull(owner: Indices, x: Floats, y: Floats) -> Indices:
    """The corners of each module's lower convex hull; x ascends and y descends within a module.

    A point on or above the chord between two others is none, whatever these are: all such points go at once, round by
    round, until every slope is steeper than the next. The chord to the last point saves a round for each point that a
    low last one undercuts.
    """
    import numpy as np

    first, last = np.searchsorted(owner, owner), np.searchsorted(owner, owner, side="right") - 1

    def slope(i: Indices, j: Indices) -> Floats:
        found: Floats = (y[j] - y[i]) / np.where(i < j, x[j] - x[i], 1.0)
        return found

    kept = np.arange(len(x))
    while True:
        inner = (first[kept] < kept) & (kept < last[kept])
        at = np.flatnonzero(inner)
        before, here, after = kept[at - 1], kept[at], kept[at + 1]
        left, right = slope(before, here), slope(here, after)
        out = (
            (left >= right)
            | (left >= slope(here, last[here]))
            | (slope(first[here], here) >= right)
        )
        if not out.any():
            return kept
        kept = np.delete(kept, at[out])


def grain(front: _Frontier, bytes_: Floats) -> int:
    """The greatest number of bytes that divides all differences; 1 where there are none."""
    import numpy as np

    differences = (bytes_ - bytes_[front.begin[front.owner]]).astype(np.int64)
    return max(int(np.gcd.reduce(differences)), 1)


def floored(budget: float, least: float, grain: int) -> float:
    """As much of the budget as can be used: `least` and whole grains. It makes the bound the tighter."""
    return least + (budget - least) // grain * grain


def solve(front: _Frontier, limit: float, grain: float = 0.0) -> tuple[Indices, float]:
    """(indices into the frontier, one a module: the least Σ value with Σ resource ≤ limit; a lower bound of that).

    Where nothing meets the limit, what takes least of the resource. `grain`: unequal values differ by at least so much.
    """
    import numpy as np

    room = limit - front.least
    used = np.cumsum(front.cost)
    count = int(np.searchsorted(used, room, side="right"))
    picks = front.begin.copy()
    np.maximum.at(picks, front.owner[front.stop[:count]], front.stop[:count])
    value = math.fsum(front.value[picks])
    if count == len(used) or room < 0:
        return picks, value
    price, left = float(front.slope[count]), room - float(used[count - 1] if count else 0.0)
    bound = value - price * left
    full = filled(front, picks, left)
    gap = math.fsum(front.value[full]) - bound
    better = _exchanged(front, picks, left, price, min(gap - 0.999 * grain, gap * (1 - 1e-9)))
    if better is not None:
        full = filled(front, better, limit - math.fsum(front.resource[better]))
    over = math.fsum(front.resource[full]) - limit
    if over > 0:  # sums of errors round; those of bytes do not
        return solve(front, limit - 2 * over, grain)[0], bound
    return full, bound


def filled(front: _Frontier, picks: Indices, room: float) -> Indices:
    """Spend the room that is left: the best value for the resource first, whatever does not fit is skipped.

    In the end no single module can be improved.
    """
    import numpy as np

    more = front.resource - front.resource[picks][front.owner]
    fits = np.flatnonzero((more > 0) & (more <= room))
    saved = front.value[picks][front.owner[fits]] - front.value[fits]
    fits = fits[np.argsort(-saved / more[fits], kind="stable")]
    now = picks.tolist()
    taken = front.resource[picks].tolist()
    for index, owner, resource in zip(
        fits.tolist(), front.owner[fits].tolist(), front.resource[fits].tolist(), strict=True
    ):
        if 0 < resource - taken[owner] <= room:
            room -= resource - taken[owner]
            now[owner], taken[owner] = index, resource
    return np.array(now, np.int64)


def _exchanged(
    front: _Frontier, picks: Indices, room: float, price: float, gap: float
) -> Indices | None:
    """A choice whose value exceeds the bound by less than `gap`, the least found; None where none is.

    Every choice exceeds the bound by price · (room it leaves) + Σ regret, where regret = change of value + price · change
    of resource ≥ 0 against `picks`, the corners that `price` selects. So only options with a regret below the gap can be
    part of a better one. They are combined module by module, least regret first, into states (resource, value) of
    which dominated and hopeless ones are dropped; the answer is exact unless there are more than CORE modules or STATES.
    """
    import numpy as np

    cost = front.resource - front.resource[picks][front.owner]
    change = front.value - front.value[picks][front.owner]
    groups = _core(front.owner, cost, change + price * cost, gap)
    down = _later([-min(cost[group].min(), 0.0) for group in groups])
    up = _later([max(cost[group].max(), 0.0) for group in groups])
    spent, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[Indices, Indices]] = []
    best: tuple[int, int] | None = None
    for n, group in enumerate(groups):
        moves = np.concatenate((picks[front.owner[group[:1]]], group))
        s, v = np.add.outer(spent, cost[moves]).ravel(), np.add.outer(value, change[moves]).ravel()
        least = v + price * np.maximum(s, room - up[n])
        good = np.flatnonzero((least < gap) & (s - down[n] <= room))
        good = _thinned(good, s, v, price, STATES // len(groups) // len(moves))
        spent, value = s[good], v[good]
        trail.append((good // len(moves), moves[good % len(moves)]))
        fits = int(np.searchsorted(spent, room, side="right"))
        if fits and value[fits - 1] + price * room < gap:
            gap, best = float(value[fits - 1]) + price * room, (n, fits - 1)
    return None if best is None else _retraced(front.owner, picks, trail, *best)


def _core(owner: Indices, cost: Floats, regret: Floats, gap: float) -> list[Indices]:
    """The options with less regret than the gap, by module, modules of least regret first."""
    import numpy as np

    near = np.flatnonzero((regret < gap) & (cost != 0))
    if not len(near):
        return []
    groups = np.split(near, np.flatnonzero(np.diff(owner[near])) + 1)
    return sorted(groups, key=lambda group: float(regret[group].min()))[:CORE]


def _later(values: list[float]) -> list[float]:
    """For each place the sum of the values after it."""
    return tail_sums(values)[1:]


def _thinned(states: Indices, spent: Floats, value: Floats, price: float, most: int) -> Indices:
    """Of these states those that no other undercuts, by what they spend; of too many, that of least regret in each group."""
    import numpy as np

    states = states[np.lexsort((value[states], spent[states]))]
    states = states[_drops(value[states])]
    if len(states) > most:
        group = np.arange(len(states)) * max(most, 1) // len(states)
        order = np.lexsort((value[states] + price * spent[states], group))
        states = states[order[np.searchsorted(group, np.arange(group[-1] + 1))]]
    return states


def _retraced(
    owner: Indices, picks: Indices, trail: list[tuple[Indices, Indices]], last: int, state: int
) -> Indices:
    """`picks` with the moves that led to a state."""
    picks = picks.copy()
    for parents, moves in reversed(trail[: last + 1]):
        picks[owner[moves[state]]] = moves[state]
        state = int(parents[state])
    return picks
