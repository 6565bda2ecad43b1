"""sv_cumulative: a share of the sum of the singular values of every module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.ops.ranks.rules.contract import Local, Rule, is_share, least

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class SvCumulative(Local):
    """The least rank with Σ kept σ / Σ σ ≥ `share`."""

    share: float

    def _check(self) -> None:
        is_share("--sv-cumulative", self.share)

    def _rank(self, module: RankCurve) -> int:
        values = [math.sqrt(energy) for energy in module.energies]
        return least(values, (1 - self.share) * math.fsum(values))


RULE = Rule(
    name="sv_cumulative",
    policy=SvCumulative,
    help="Keep Σ kept σ / Σ σ ≥ C, per module.",
    order=7,
    low=0,
    high=1,
    above=True,
    metavar="C",
)
