"""Which rank every module keeps: one policy for each rank option of the command line, over lists of numbers.

`Rank`, `Energy` and the three `Sv…` decide module by module. `Error` and `Size` look at the whole adapter. They are
multiple-choice knapsacks: every module takes one of its options, each so many bytes and so much squared error. The lower
convex hulls of all modules, merged by slope, give the optimum of the linear relaxation (Sinha and Zoltners 1979), which is
also the Lagrangian one (Shoham and Gersho 1988), and with it a bound. Between it and a whole choice lies less than one
step of one module: the options that could still close this gap are few, and are tried together (Pisinger 1995, the core of
the problem), exactly where they are few enough. `least_error` and `least_bytes` do this for options of any kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptkit.errors import NotRepresentable, WrongUsage
from adaptkit.ops.ranks.knapsack import (
    RankCurve,
    filled,
    floored,
    frontier,
    grain,
    ranked,
    solve,
    tail_sums,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]
    Measure = Callable[[Sequence[int]], int]

__all__ = [
    "Energy",
    "Error",
    "Policy",
    "Rank",
    "Size",
    "SvCumulative",
    "SvFro",
    "SvRatio",
    "capped",
]

ROUNDING = 1e-15  # of a sum: what 0.7 + 0.25 may lack of 0.95
ROUNDS = 12  # budgets tried to fit a file to its size; to measure SDXL takes 10 ms
SPARE = 1e-4  # of the size: less is not worth another budget
FILLS = 4  # tries to use what is left then


def capped(modules: Sequence[RankCurve], max_rank: int | None) -> Sequence[RankCurve]:
    """The same modules, none of which can have more than `max_rank`; what the cap cuts off stays in `norm`."""
    if max_rank is None:
        return modules
    return [
        RankCurve(m.energies[:max_rank], m.norm, m.sizes[: max_rank + 1], m.convolution)
        for m in modules
    ]


# --- policies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A way to choose ranks; `max_rank` caps every one of them."""

    local: ClassVar[bool] = False  # whether the rank of a module depends on no other
    max_rank: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("--max-rank", self.max_rank)
        self._check()

    def _check(self) -> None:
        """Raise for arguments out of range, naming the option."""

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:
        """The rank of every module, in their order.

        `measure` gives the exact size in bytes of the whole file at some ranks; only `Size` asks, at most 17 times.
        Without it that size is the sum of the modules'.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Local(Policy):
    """RankCurve by module: at least rank 1 even where there is no energy, 0 only where there are no ranks."""

    local: ClassVar[bool] = True

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:  # noqa: ARG002
        cap = math.inf if self.max_rank is None else self.max_rank
        return [int(min(max(self._rank(m), 1), len(m.energies), cap)) for m in modules]

    def _rank(self, module: RankCurve) -> int:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Rank(_Local):
    """The same rank everywhere, as far as a layer allows it; convolutions may have their own."""

    rank: int
    conv_rank: int | None = None

    def _check(self) -> None:
        _at_least_one("--rank", self.rank)
        _at_least_one("--conv-rank", self.conv_rank)

    def _rank(self, module: RankCurve) -> int:
        return self.conv_rank if module.convolution and self.conv_rank is not None else self.rank


@dataclass(frozen=True, slots=True)
class Energy(_Local):
    """The least rank that keeps `share` of ‖ΔW‖²; where none does, the least that keeps what can be kept."""

    share: float

    def _check(self) -> None:
        _is_share("--energy", self.share)

    def _rank(self, module: RankCurve) -> int:
        return _keeping(module, self.share)


@dataclass(frozen=True, slots=True)
class SvRatio(_Local):
    """As many as are at least σ₁ / `ratio`."""

    ratio: float

    def _check(self) -> None:
        if not self.ratio >= 1:
            raise WrongUsage(f"--sv-ratio must be at least 1, not {self.ratio}")

    def _rank(self, module: RankCurve) -> int:
        top = max(module.energies, default=0.0)
        least = top / self.ratio / self.ratio * (1 - 8 * ROUNDING)
        return sum(energy >= least for energy in module.energies) if top > 0 else 1


@dataclass(frozen=True, slots=True)
class SvFro(_Local):
    """The least rank with √(Σ kept σ² / Σ σ²) ≥ `share`, which is to keep share² of ‖ΔW‖²."""

    share: float

    def _check(self) -> None:
        _is_share("--sv-fro", self.share)

    def _rank(self, module: RankCurve) -> int:
        return _keeping(module, self.share**2)


@dataclass(frozen=True, slots=True)
class SvCumulative(_Local):
    """The least rank with Σ kept σ / Σ σ ≥ `share`."""

    share: float

    def _check(self) -> None:
        _is_share("--sv-cumulative", self.share)

    def _rank(self, module: RankCurve) -> int:
        values = [math.sqrt(energy) for energy in module.energies]
        return _least(values, (1 - self.share) * math.fsum(values))


@dataclass(frozen=True, slots=True)
class Error(Policy):
    """The fewest bytes with √(Σ left-out energy / Σ ‖ΔW‖²) ≤ `error` over the whole adapter.

    Where no ranks reach that (a cap, energies that do not sum to the norm), the fewest with the least error there is. A
    module may get rank 0, but not all of them.
    """

    error: float

    def _check(self) -> None:
        if not 0 <= self.error <= 1:
            raise WrongUsage(f"--error must be at least 0 and at most 1, not {self.error}")

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:  # noqa: ARG002, D102
        modules = capped(modules, self.max_rank)
        options = ranked(modules)
        front = frontier(options, options.error, options.bytes)
        allowed = self.error**2 * math.fsum(options.error[options.first[:-1]])
        picks, _ = solve(front, allowed, grain(front, front.value))
        ranks = options.chosen(front.where[picks])
        return ranks if any(ranks) else _smallest(modules)


@dataclass(frozen=True, slots=True)
class Size(Policy):
    """The least error of the whole adapter in a file of at most `bytes`.

    A module may get rank 0, but not all of them: NotRepresentable where the smallest module at rank 1 is too much.
    """

    bytes: int

    def _check(self) -> None:
        if not self.bytes > 0:
            raise WrongUsage(f"--size must be above 0, not {self.bytes}")

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:  # noqa: D102
        modules = capped(modules, self.max_rank)
        size = measure or (
            lambda ranks: sum(m.sizes[k] for m, k in zip(modules, ranks, strict=True))
        )
        smallest = _smallest(modules)
        least = size(smallest)
        if least > self.bytes:
            raise NotRepresentable(
                f"no rank is low enough for {self.bytes} bytes: the smallest file possible takes {least}",
                hint=f"ask for --size {least} or more",
            )
        return _fitted(modules, self.bytes, size, smallest)


def _at_least_one(option: str, rank: int | None) -> None:
    if rank is not None and not rank >= 1:
        raise WrongUsage(f"{option} must be at least 1, not {rank}")


def _is_share(option: str, share: float) -> None:
    if not 0 < share <= 1:
        raise WrongUsage(f"{option} must be above 0 and at most 1, not {share}")


def _keeping(module: RankCurve, share: float) -> int:
    """The least rank that keeps this share of ‖ΔW‖²."""
    total = math.fsum(module.energies)
    rest = max(module.norm - total, 0.0)
    return _least(module.energies, (1 - share) * max(module.norm, total) - rest)


def _least(values: Sequence[float], allowed: float) -> int:
    """The least k with Σ values[k:] ≤ `allowed`, but for rounding; with Σ values[k:] = 0 where that is below 0."""
    left = tail_sums(values)
    limit = max(allowed, 0.0) + ROUNDING * left[0]
    return next(k for k, value in enumerate(left) if value <= limit)


def _smallest(modules: Sequence[RankCurve]) -> list[int]:
    """Rank 1 for the module where it takes the fewest bytes, 0 for all others."""
    ranks = [0] * len(modules)
    able = [n for n, m in enumerate(modules) if m.energies]
    if able:
        ranks[min(able, key=lambda n: modules[n].sizes[1] - modules[n].sizes[0])] = 1
    return ranks


def _fitted(
    modules: Sequence[RankCurve], limit: int, size: Measure, smallest: list[int]
) -> list[int]:
    """The least error with size(ranks) ≤ limit; `smallest` is known to fit.

    What the file takes beyond its modules is known only for given ranks, so that the budget of the modules is searched:
    by supposing it stays as last measured, by longer steps after repeated misses, by bisection where both lead nowhere.
    """
    options = ranked(modules)
    front = frontier(options, options.bytes, options.error)
    step = grain(front, front.resource)

    def room(picks: Indices) -> int:
        ranks = options.chosen(front.where[picks])
        return limit - size(ranks if any(ranks) else smallest)

    best, spare = front.begin, 0
    fits, exceeds, misses = front.least, math.inf, 0
    budget = max(float(limit), front.least)
    for _ in range(ROUNDS):
        picks, _ = solve(front, floored(budget, front.least, step))
        used, left = math.fsum(front.resource[picks]), room(picks)
        if left < 0:
            exceeds, misses = used, misses + 1
        else:
            fits, misses = budget, 0
            best, spare = picks, left
        budget = used + left * 2 ** max(misses - 1, 0)
        if not fits < budget < exceeds:
            budget = math.floor((fits + exceeds) / 2) if exceeds < math.inf else fits
        if budget <= fits or (best is picks and spare < SPARE * limit):
            break
    for _ in range(FILLS):
        picks = filled(front, best, spare)
        if spare <= 0 or (picks == best).all():
            break
        left = room(picks)
        best, spare = (picks, left) if left >= 0 else (best, spare // 2)
    ranks = options.chosen(front.where[best])
    return ranks if any(ranks) else smallest


# --- options of any kind ---------------------------------------------------------------------------------------------


# --- the multiple-choice knapsack ------------------------------------------------------------------------------------
