"""energy: the least rank of every module that keeps a share of its energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.ops.ranks.rules.contract import Local, Rule, is_share, keeping

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class Energy(Local):
    """The least rank that keeps `share` of ‖ΔW‖².

    If no rank does, the least rank that keeps all that can be kept.
    """

    share: float

    def _check(self) -> None:
        is_share("--energy", self.share)

    def _rank(self, module: RankCurve) -> int:
        return keeping(module, self.share)


RULE = Rule(
    name="energy",
    policy=Energy,
    help="The least rank per module keeping this share of ‖ΔW‖².",
    order=2,
    low=0,
    high=1,
    above=True,
    metavar="E",
)
