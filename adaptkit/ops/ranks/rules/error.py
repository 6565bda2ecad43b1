"""error: the smallest file within a relative error of the whole adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import WrongUsage
from adaptkit.ops.ranks.knapsack import frontier, grain, ranked, solve
from adaptkit.ops.ranks.rules.contract import Policy, Rule, capped, smallest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.ops.ranks.knapsack import RankCurve
    from adaptkit.ops.ranks.rules.contract import Measure


@dataclass(frozen=True, slots=True)
class Error(Policy):
    """The fewest bytes with √(Σ left-out energy / Σ ‖ΔW‖²) ≤ `error` over the whole adapter.

    If no ranks reach that (a cap, energies that do not sum to the norm), the fewest bytes of the
    least error. A module may get rank 0, but not all of them.
    """

    error: float

    def _check(self) -> None:
        if not 0 <= self.error <= 1:
            raise WrongUsage(f"--error must be at least 0 and at most 1, not {self.error}")

    @property
    def most_error(self) -> float:
        """The relative error asked for."""
        return self.error

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:
        """The rank of every module, see `Policy.choose`."""
        modules = capped(modules, self.max_rank)
        options = ranked(modules)
        front = frontier(options, options.error, options.bytes)
        allowed = self.error**2 * math.fsum(options.error[options.first[:-1]])
        picks, _ = solve(front, allowed, grain(front, front.value))
        ranks = options.chosen(front.where[picks])
        return ranks if any(ranks) else smallest(modules)


RULE = Rule(
    name="error",
    policy=Error,
    help="The smallest file with a relative error of at most E over the whole adapter.",
    order=3,
    low=0,
    high=1,
    metavar="E",
    total=True,
)
