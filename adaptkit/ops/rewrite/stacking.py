"""Which modules are computed as one stack, and the working memory of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import THIN
from adaptkit.ops.difference.working import svd_bytes
from adaptkit.ops.ranks.options import largest
from adaptkit.ops.rewrite.plan import Task, product_rank
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Hashable

    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.ops.rewrite.plan import RecastOptions

BLOCK = 1 << 18  # entries of ΔW that are measured at a time, in float64

__all__ = ["likeness_of", "step_of"]


def step_of(
    task: Task, options: RecastOptions, base: Checkpoint | None = None, *, mixed: bool = False
) -> Step[Task]:
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
    elif task.one_difference and task.kind.low_rank and task.base is None:
        # as it is and as it is stored, beside an identity
        size = 8 * dense + 8 * min(facts.rows, facts.columns) ** 2
    else:
        size = 16 * elements
        if base is not None and task.base is not None and len(task.terms) == 1:
            size += _on_base(task, task.base, options, base)
        elif mixed:  # each ΔW in float64, and what comes of them
            size += 8 * (len(task.terms) + 1) * dense
        else:
            size += _beside(task, dense, options)
    return Step(task, shape, size, order)


def _beside(task: Task, dense: int, options: RecastOptions) -> int:
    """Bytes beside the factors, for ΔW of `dense` numbers; measured (tests/ops/peaks.py)."""
    if not ("changed" in task.changes or task.kind.dense or task.base is not None):
        return _as_it_is(task)
    if len(task.terms) > 1:  # all ΔW and their sum: float32 if it is decomposed, else float64
        held = len(task.terms) + 1
        return 4 * held * dense if task.ranked else 8 * held * dense + 4 * dense
    if task.base is None and task.ranked and _thin(task):  # decomposed by Gram matrices, and cut
        return 16 * _factor_numbers(task)
    if task.base is None and not task.ranked:
        if task.kind.dense:  # ΔW in float64, as stored, and as measured in blocks
            return 12 * dense + 16 * min(dense, BLOCK)
        if task.kind.low_rank:
            return _factors(task, dense)
    fitted = task.base is None and not task.ranked and task.kind.kron
    once = fitted and task.kind.fit_copies(None, options.factor) == 1  # and its small factors
    return (9 if once else 16) * dense


def _as_it_is(task: Task) -> int:
    """Bytes beside 16 for each stored number, of a kind that stays what it is; measured.

    What is stored is read again and compared in float64.
    """
    size = 0
    for term in task.terms:
        infos = term.job.adapter.source.infos
        for entry in term.job.entries:
            shapes = {role: infos[key].shape for role, key in entry.tensors()}
            numbers = sum(map(math.prod, shapes.values()))
            whole = entry.kind.whole_numbers(shapes)
            if task.ranked and len(task.terms) == 1:
                size += entry.kind.cutting_bytes(shapes)
            elif whole > numbers:
                size += 20 * whole
            else:
                size += (10 if len(task.terms) == 1 else 15) * numbers
    return size


def _on_base(task: Task, place: tuple[Piece, ...], options: RecastOptions, base: Checkpoint) -> int:
    """Bytes beside the factors of what a kind makes of W, in float64."""
    rows, *rest = base.slot_shape(place)
    columns = math.prod(rest)
    numbers, stored = rows * columns, base.nbytes(place)
    kinds = {entry.kind for entry in task.entries}
    applying = max(kind.applying_wide * kind.applying(rows, columns) for kind in kinds)
    if not task.kind.additive:  # W' of the exact and of the stored weights
        return stored + 16 * numbers + applying
    beside = 4 * numbers + 16 * min(numbers, BLOCK)  # as stored, and as measured in blocks
    if task.kind.low_rank:
        rank = largest(options, convolution=task.convolution) if task.ranked else None
        beside += 12 * min(rows, columns) ** 2  # beside an identity
        if rank is not None:
            beside = svd_bytes(rows, columns, rank)
    return stored + 8 * numbers + max(applying, beside)


def _factors(task: Task, dense: int) -> int:
    # exact factors in float64, as stored, and as measured: thin ones by a QR of both together,
    # others in blocks of rows, of which one factor alone may be an identity
    if _thin(task):
        return 60 * _factor_numbers(task)
    facts = task.entries[0].facts
    right = 8 * product_rank(task.terms[0]) * facts.columns if facts.rows > facts.columns else 0
    return 12 * _factor_numbers(task) + 16 * min(dense, BLOCK) + right


def _factor_numbers(task: Task) -> int:
    """How many numbers the exact factors of ΔW have."""
    facts = task.entries[0].facts
    return product_rank(task.terms[0]) * (facts.rows + facts.columns)


def _thin(task: Task) -> bool:
    """Whether those cost less than ΔW itself."""
    facts = task.entries[0].facts
    return product_rank(task.terms[0]) <= THIN * min(facts.rows, facts.columns)


def likeness_of(task: Task, swapped: bool) -> Hashable:
    """What two tasks must share to be computed as one stack; None for a task by itself.

    Only modules of one piece whose rank is cut are stacked.
    """
    whole = task.terms[0].job.whole
    if not task.ranked or task.base is not None or "summed" in task.changes or whole is None:
        return None
    if not (task.kind.stacks and whole.kind.stacks and _thin(task)):
        return None
    infos = task.terms[0].job.adapter.source.infos
    term = task.terms[0]
    place = term.number, term.weight, swapped
    return task.kind, task.changes, place, whole.likeness(infos)
