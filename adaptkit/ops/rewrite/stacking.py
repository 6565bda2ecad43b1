"""Which modules are computed as one stack, and the working memory of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import THIN
from adaptkit.ops.rewrite.plan import Task, product_rank
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["likeness_of", "step_of"]


def step_of(task: Task) -> Step[Task]:
    """The step of a slot: tensors as read, computed in float32 and float64, and rounded."""
    adapter = task.terms[0].job.adapter
    elements = dense = 0
    for term in task.terms:
        infos = term.job.adapter.source.infos
        fused = len(term.job.parts) if len(term.job.parts) > 1 else 1
        elements += fused * sum(
            infos[key].numel for entry in term.job.entries for _, key in entry.tensors()
        )
        dense = max(dense, sum(e.facts.rows * e.facts.columns for e in term.job.entries))
    whole = "changed" in task.changes or task.kind.dense or task.base is not None
    order = adapter.source.order(next(task.entries[0].tensors())[1])
    shape = task.number if task.likeness is None else task.likeness
    # in float64: ΔW of one, or those of several, and their sum
    copies = 30 if len(task.terms) > 1 else 16
    return Step(task, shape, 16 * elements + (copies * dense if whole else 0), order)


def likeness_of(task: Task, swapped: bool) -> Hashable:
    """What two tasks must share to be computed as one stack; None for a task by itself.

    Only modules of one piece whose rank is cut are stacked.
    """
    whole = task.terms[0].job.whole
    if not task.ranked or task.base is not None or "summed" in task.changes or whole is None:
        return None
    thin = product_rank(task.terms[0]) <= THIN * min(whole.facts.rows, whole.facts.columns)
    if not (task.kind.stacks and whole.kind.stacks and thin):
        return None
    infos = task.terms[0].job.adapter.source.infos
    term = task.terms[0]
    place = term.number, term.weight, swapped
    return task.kind, task.changes, place, whole.likeness(infos)
