"""sv_ratio: the singular values of every module that are not too small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import WrongUsage
from adaptkit.ops.ranks.rules.contract import ROUNDING, Local, Rule

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class SvRatio(Local):
    """All singular values of at least σ₁ / `ratio`."""

    ratio: float

    def _check(self) -> None:
        if not self.ratio >= 1:
            raise WrongUsage(f"--sv-ratio must be at least 1, not {self.ratio}")

    def _rank(self, module: RankCurve) -> int:
        top = max(module.energies, default=0.0)
        lowest = top / self.ratio / self.ratio * (1 - 8 * ROUNDING)
        return sum(energy >= lowest for energy in module.energies) if top > 0 else 1


RULE = Rule(
    name="sv_ratio",
    policy=SvRatio,
    help="Keep σᵢ ≥ σ₁ / R, per module.",
    order=5,
    low=1,
    metavar="R",
)
