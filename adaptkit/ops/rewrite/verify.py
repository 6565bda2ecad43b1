"""Read the values of a rewritten adapter back and measure what its reader gets."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.ops.adapter_file.verified import BLOCK, agreed, distance
from adaptkit.ops.rewrite.compute import Rewriter
from adaptkit.ops.rewrite.report import dropped_norm, losses, total_error
from adaptkit.ops.rewrite.rounding import lost
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.names import Slot
    from adaptkit.ops.rewrite.plan import Recast, Task
    from adaptkit.ops.rewrite.state import State
    from adaptkit.ops.stages import Progress

__all__ = ["Verifier"]


class Verifier:
    """Compare every module in the file with its inputs, one at a time, in float64.

    What is compared beside the tensors of a module is a block of rows, or factors.
    """

    def __init__(self, plan: Recast, state: State, progress: Progress | None = None) -> None:
        self.plan, self.state, self.progress = plan, state, progress
        self.measured: float | None = None  # None if it depends on a base that is not given

    def __call__(self, stored: Callable[[Slot], Weights]) -> None:
        """Measure the file. CorruptFile if its error is not the one to report."""
        plan, state = self.plan, self.state
        reported = total_error(plan, state, losses(plan, state))
        if reported is None:
            return
        worker = Rewriter(plan, state)
        norm = error = dropped_norm(plan) or 0.0
        tally = Tally(self.progress, "verifying", len(plan.tasks), "modules")
        for task in plan.tasks:
            tally.add(1)
            tensors = worker.load(task)
            meant = worker.meant(task, tensors).widened()
            if state.dropped(task):
                found = meant.times(0.0) if meant.additive else None
            else:
                found = stored(task.slot)
            base = tensors.get("base")
            whole, gone = self._lost(task, meant, meant if found is None else found, base)
            if whole is None or gone is None:
                return  # nothing was changed that a base would tell: it was copied
            norm, error = norm + whole, error + (whole if found is None else gone)
        self.measured = agreed((error / norm) ** 0.5 if norm else 0.0, reported, plan.output)

    def _lost(
        self, task: Task, meant: Weights, found: Weights, base: Tensor | None
    ) -> tuple[float | None, float | None]:
        """What `lost` gives, without forming a whole ΔW where that is large."""
        additive = meant.additive and found.additive
        if base is None and not additive:
            return None, None
        rows = meant.rows if base is None else base.shape[-2]
        size = rows, task.entries[0].facts.columns or (0 if base is None else base.shape[-1])
        formed = not (additive and _thin(meant) and _thin(found))
        if formed and (additive or base is not None) and math.prod(size) > BLOCK:
            with suppress(NotRepresentable):  # no rows of its own, as a DoRA of the input axis
                return distance(meant, found, size, None if additive else base)
        return lost(meant, found, base, None)


def _thin(weights: Weights) -> bool:
    """Whether ΔW is compared without being formed."""
    return weights.kron_factors() is not None or weights.thin_factors() is not None
