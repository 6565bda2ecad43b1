"""Read the values of an extracted adapter back and measure what it leaves of the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.ops.adapter_file.verified import agreed, row_blocks, rows_of
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.names import Slot
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.plan import Plan
    from adaptkit.ops.stages import Progress

__all__ = ["Verifier"]


class Verifier:
    """Subtract every module in the file from tuned − base, block by block, in float64."""

    def __init__(
        self,
        plan: Plan,
        stored: frozenset[int],
        reported: float,
        progress: Progress | None = None,
    ) -> None:
        self.plan, self.stored, self.reported = plan, stored, reported
        self.measured: float | None = None
        self.progress = progress

    def __call__(self, weights: Callable[[Slot], Weights]) -> None:
        """Measure the file. CorruptFile if its error is not the one to report."""
        norm = rest = 0.0
        tally = Tally(self.progress, "verifying", len(self.plan.jobs), "layers")
        for job in self.plan.jobs:
            tally.add(1)
            stored = None
            if job.number in self.stored:
                assert job.slot is not None
                stored = weights(job.slot).widened()
            for start, stop, delta in self._differences(job):
                norm += float(delta.square().sum())
                left = delta if stored is None else delta - rows_of(stored, start, stop)
                rest += float(left.square().sum())
        self.measured = agreed((rest / norm) ** 0.5, self.reported, self.plan.output)

    def _differences(self, job: Pair) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, tuned − base) of blocks of rows."""
        rows, columns = job.matrix
        step = next((stop for _, stop in row_blocks(rows, columns)), 1)
        blocks = (c.blocks(p, step) for c, p in self._sides(job))
        start = 0
        for tuned, base in zip(*blocks, strict=True):
            stop = start + len(tuned)
            yield start, stop, tuned.double() - base.double()
            start = stop

    def _sides(self, job: Pair) -> tuple[tuple[Checkpoint, tuple[Piece, ...]], ...]:
        return (self.plan.tuned, job.tuned), (self.plan.base, job.base)
