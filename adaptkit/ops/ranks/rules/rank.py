"""rank: the same rank everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.ops.ranks.rules.contract import Local, Rule, at_least_one

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class Rank(Local):
    """The same rank everywhere, as far as a layer allows it; convolutions may have their own."""

    rank: int
    conv_rank: int | None = None

    def _check(self) -> None:
        at_least_one("--rank", self.rank)
        at_least_one("--conv-rank", self.conv_rank)

    def _rank(self, module: RankCurve) -> int:
        return self.conv_rank if module.convolution and self.conv_rank is not None else self.rank


RULE = Rule(
    name="rank",
    policy=Rank,
    help="This rank everywhere, as far as a layer allows.",
    order=1,
    kind=int,
    low=1,
    extras=("conv_rank",),
    fixed=True,
)
