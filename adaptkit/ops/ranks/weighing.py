"""Ranks by what each module changes of its own layer, ‖ΔW‖ / ‖W‖, rather than by ‖ΔW‖ alone.

Each ‖ΔW‖² counts divided by the ‖W‖² of its layer, as in resize_lora (elias-gaeros/resize_lora,
its score `fro_ckpt`). The choice is then the optimum of that sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.ops.ranks.knapsack import RankCurve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.ops.ranks.rules.contract import Measure, Policy

__all__ = ["Weighed", "weighed"]


class Weighed(NamedTuple):
    """Ranks, and the relative errors of them and of the plain optimum.

    Each pair is (weighed, plain): over ‖ΔW‖ / ‖W‖, and over ‖ΔW‖.
    """

    ranks: list[int]
    own: tuple[float, float]
    optimum: tuple[float, float]

    def note(self) -> str:
        """Both figures in a sentence."""
        return (
            f"weighed by ‖ΔW‖/‖W‖ of each layer: that loses {self.own[0]:.3g} (the plain optimum "
            f"{self.optimum[0]:.3g}), and ‖ΔW‖ itself {self.own[1]:.3g} (the plain optimum "
            f"{self.optimum[1]:.3g})."
        )


def weighed(
    policy: Policy, modules: Sequence[RankCurve], norms: Sequence[float], measure: Measure | None
) -> Weighed:
    """Choose ranks with each module divided by its layer's ‖W‖² (`norms`, above 0)."""
    scaled = [
        RankCurve([e / norm for e in one.energies], one.norm / norm, one.sizes, one.convolution)
        for one, norm in zip(modules, norms, strict=True)
    ]
    # the plain optimum first: `measure` keeps what it was asked last
    plain = policy.choose(modules, measure)
    ranks = policy.choose(scaled, measure)
    return Weighed(
        ranks,
        (_lost(scaled, ranks), _lost(modules, ranks)),
        (_lost(scaled, plain), _lost(modules, plain)),
    )


def _lost(modules: Sequence[RankCurve], ranks: Sequence[int]) -> float:
    """The relative error of a choice."""
    whole = math.fsum(module.norm for module in modules)
    left = math.fsum(m.errors()[rank] for m, rank in zip(modules, ranks, strict=True))
    return math.sqrt(left / whole) if whole else 0.0
