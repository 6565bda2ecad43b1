"""Which modules are computed as one stack, and the working memory of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import THIN
from adaptkit.ops.difference.working import svd_bytes
from adaptkit.ops.ranks.options import Ranked, largest
from adaptkit.ops.rewrite.plan import Task, product_rank
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["likeness_of", "step_of"]


def step_of(task: Task, options: Ranked) -> Step[Task]:
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
    order = adapter.source.order(next(task.entries[0].tensors())[1])
    shape = task.number if task.likeness is None else task.likeness
    facts = task.entries[0].facts
    if task.ranked and len(task.terms) == 1 and task.entries[0].kind.dense:
        # ΔW is read, decomposed in float32, and never made again
        rank = largest(options, convolution=task.convolution) or min(facts.rows, facts.columns)
        size = 5 * elements + svd_bytes(facts.rows, facts.columns, rank)
    else:
        size = 16 * elements + _beside(task, dense)
    return Step(task, shape, size, order)


def _beside(task: Task, dense: int) -> int:
    """Bytes beside the factors, for ΔW of `dense` numbers; measured (tests/ops/peaks.py)."""
    if not ("changed" in task.changes or task.kind.dense or task.base is not None):
        return 0
    if len(task.terms) > 1:  # all ΔW and their sum: float32 if it is decomposed, else float64
        held = len(task.terms) + 1
        return 4 * held * dense if task.ranked else 8 * held * dense + 4 * dense
    if task.base is None and not task.ranked:
        if task.kind.dense:  # ΔW in float64, and as stored
            return 12 * dense
        if task.kind.low_rank:
            return _factors(task, dense)
    return 16 * dense


def _factors(task: Task, dense: int) -> int:
    facts = task.entries[0].facts
    if task.entries[0].kind.dense:  # all singular vectors in float64, and a Gram matrix
        return 16 * dense + 67 * min(facts.rows, facts.columns) ** 2
    # exact factors in float64, as stored, and as measured
    return 20 * product_rank(task.terms[0]) * (facts.rows + facts.columns)


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
