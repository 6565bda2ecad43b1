"""toy: a share of the ranks of every module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.ops.ranks.rules.contract import Local, Rule, is_share

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class ToyRule(Local):
    """This share of the ranks that a module has."""

    share: float

    def _check(self) -> None:
        is_share("--toy", self.share)

    def _rank(self, module: RankCurve) -> int:
        return math.ceil(self.share * len(module.energies))


RULE = Rule(name="toy", policy=ToyRule, help="This share of the ranks.", order=99, metavar="T")
