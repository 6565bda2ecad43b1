"""The layers of a checkpoint that modules are weighed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.ops.rewrite.checks import check_base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.ops.rewrite.plan import Task

__all__ = ["Weighing", "weighing"]

BLOCK = 1 << 22  # numbers read at a time


@dataclass(frozen=True)
class Weighing:
    """A checkpoint, and where each task's layer is in it, by the task's number."""

    checkpoint: Checkpoint
    places: Mapping[int, tuple[Piece, ...]]

    def norms(self, tasks: Sequence[Task]) -> list[float]:
        """‖W‖² of the layer of each task, in float64; NotRepresentable if it is 0 or not finite."""
        return [self._norm(task) for task in tasks]

    def _norm(self, task: Task) -> float:
        import torch

        pieces, found = self.places[task.number], 0.0
        rows, *rest = self.checkpoint.slot_shape(pieces)
        step = max(1, BLOCK // max(1, torch.Size(rest).numel()))
        for block in self.checkpoint.blocks(pieces, min(step, rows)):
            found += float(block.double().square().sum())
        if not 0.0 < found < float("inf"):
            raise NotRepresentable(
                f"‖W‖ of this layer is {found**0.5:g}, by which nothing can be weighed",
                file=self.checkpoint.source.path,
                tensor=task.label,
            )
        return found


def weighing(tasks: Sequence[Task], checkpoint: Checkpoint) -> Weighing:
    """Find the layers of the tasks that get a rank; NotRepresentable without one of them."""
    held, places = checkpoint.targets(), {}
    for task in (task for task in tasks if task.ranked):
        pieces = checkpoint.locate(task.slot, held.get(task.slot.target, {}))
        if pieces is None:
            raise NotRepresentable(
                f"the checkpoint to weigh by has no {task.label}",
                hint="is it the model of this adapter? --skip leaves modules out",
                file=checkpoint.source.path,
            )
        check_base(task, checkpoint, pieces)
        places[task.number] = pieces
    return Weighing(checkpoint, places)
