"""sv_fro: a share of the Frobenius norm of every module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.ops.ranks.rules.contract import Local, Rule, is_share, keeping

if TYPE_CHECKING:
    from adaptkit.ops.ranks.knapsack import RankCurve


@dataclass(frozen=True, slots=True)
class SvFro(Local):
    """The least rank with √(Σ kept σ² / Σ σ²) ≥ `share`: it keeps share² of ‖ΔW‖²."""

    share: float

    def _check(self) -> None:
        is_share("--sv-fro", self.share)

    def _rank(self, module: RankCurve) -> int:
        return keeping(module, self.share**2)


RULE = Rule(
    name="sv_fro",
    policy=SvFro,
    help="Keep √(Σ kept σ² / Σ σ²) ≥ F, per module.",
    order=6,
    low=0,
    high=1,
    above=True,
    metavar="F",
)
