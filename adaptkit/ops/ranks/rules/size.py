"""size: the least error of the whole adapter in a file of limited size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable, WrongUsage
from adaptkit.ops.ranks.knapsack import SPARE, filled, floored, frontier, grain, ranked, solve
from adaptkit.ops.ranks.rules.contract import Policy, Rule, capped, smallest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from adaptkit.ops.ranks.knapsack import RankCurve
    from adaptkit.ops.ranks.rules.contract import Measure

    Indices = NDArray[np.int64]

ROUNDS = 12  # budgets tried to fit a file to its size; measuring SDXL once takes 10 ms
FILLS = 4  # attempts to spend the rest


@dataclass(frozen=True, slots=True)
class Size(Policy):
    """The least error of the whole adapter in a file of at most `bytes`.

    A module may get rank 0, but not all of them: NotRepresentable if the smallest module does not
    fit at rank 1.
    """

    bytes: int

    def _check(self) -> None:
        if not self.bytes > 0:
            raise WrongUsage(f"--size must be above 0, not {self.bytes}")

    @property
    def most_bytes(self) -> int:
        """The size asked for."""
        return self.bytes

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:
        """The rank of every module, see `Policy.choose`."""
        modules = capped(modules, self.max_rank)
        size = measure or (
            lambda ranks: sum(m.sizes[k] for m, k in zip(modules, ranks, strict=True))
        )
        fewest = smallest(modules)
        taken = size(fewest)
        if taken > self.bytes:
            raise NotRepresentable(
                f"no rank is low enough for {self.bytes} bytes: "
                f"the smallest file possible takes {taken}",
                hint=f"ask for --size {taken} or more",
            )
        return _fitted(modules, self.bytes, size, fewest)


def _fitted(
    modules: Sequence[RankCurve], limit: int, size: Measure, smallest: list[int]
) -> list[int]:
    """The least error with size(ranks) ≤ limit; `smallest` is known to fit.

    Only given ranks tell what the file takes beyond its modules, so the budget of the modules is
    searched: first as if that were constant, by longer steps after repeated misses, and by
    bisection if both fail.
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


RULE = Rule(
    name="size",
    policy=Size,
    help="The least error in a file of at most SIZE.",
    order=4,
    kind=int,
    bytes=True,
    metavar="SIZE",
    total=True,
)
