"""Read the values of an extracted adapter back and measure what it leaves of the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.ops.adapter_file.verified import agreed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.names import Slot
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.plan import Plan

__all__ = ["Verifier"]


class Verifier:
    """Subtract every module in the file from tuned − base, one at a time, in float64."""

    def __init__(self, plan: Plan, stored: frozenset[int], reported: float) -> None:
        self.plan, self.stored, self.reported = plan, stored, reported
        self.measured: float | None = None

    def __call__(self, weights: Callable[[Slot], Weights]) -> None:
        """Measure the file. CorruptFile if its error is not the one to report."""
        norm = rest = 0.0
        for job in self.plan.jobs:
            delta = self._difference(job)
            norm += float(delta.square().sum())
            if job.number in self.stored:
                assert job.slot is not None
                delta -= _delta(weights(job.slot))
            rest += float(delta.square().sum())
        self.measured = agreed((rest / norm) ** 0.5, self.reported, self.plan.output)

    def _difference(self, job: Pair) -> Tensor:
        plan = self.plan
        return plan.tuned.read(job.tuned).double() - plan.base.read(job.base).double()


def _delta(weights: Weights) -> Tensor:
    """ΔW in float64."""
    try:
        left, right = weights.factors()
    except NotRepresentable:
        return weights.delta().double()
    return left.double() @ right.double()
