"""Read the values of a rewritten adapter back and measure what its reader gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.ops.adapter_file.verified import agreed
from adaptkit.ops.rewrite.compute import Rewriter, lost
from adaptkit.ops.rewrite.report import dropped_norm, losses, total_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptkit.algorithms.contract import Weights
    from adaptkit.names import Slot
    from adaptkit.ops.rewrite.plan import Recast
    from adaptkit.ops.rewrite.state import State

__all__ = ["Verifier"]


class Verifier:
    """Compare every module in the file with its inputs, one at a time, in float64."""

    def __init__(self, plan: Recast, state: State) -> None:
        self.plan, self.state = plan, state
        self.measured: float | None = None  # None if it depends on a base that is not given

    def __call__(self, stored: Callable[[Slot], Weights]) -> None:
        """Measure the file. CorruptFile if its error is not the one to report."""
        plan, state = self.plan, self.state
        reported = total_error(plan, state, losses(plan, state))
        if reported is None:
            return
        worker = Rewriter(plan, state)
        norm = error = dropped_norm(plan) or 0.0
        for task in plan.tasks:
            tensors = worker.load(task)
            meant = worker.meant(task, tensors).widened()
            if state.dropped(task):
                found = meant.times(0.0) if meant.additive else None
            else:
                found = stored(task.slot)
            base = tensors.get("base")
            whole, gone = lost(meant, meant if found is None else found, base, None)
            if whole is None or gone is None:
                return  # nothing was changed that a base would tell: it was copied
            norm, error = norm + whole, error + (whole if found is None else gone)
        self.measured = agreed((error / norm) ** 0.5 if norm else 0.0, reported, plan.output)
