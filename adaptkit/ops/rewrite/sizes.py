"""Refuse inputs of models of different sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptkit.errors import ShapeMismatch

if TYPE_CHECKING:
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.ops.rewrite.plan import Task
    from adaptkit.respelling import Assembly

__all__ = ["check_base", "check_sizes"]


def check_sizes(task: Task) -> None:
    """ShapeMismatch if two inputs adapt a layer of different sizes; 0 is a size not known."""
    first, *others = task.terms
    for term in others:
        _same_size(task, term.job, _size(first.job), first.job.adapter.source.path.name)


def check_base(task: Task, base: Checkpoint, pieces: tuple[Piece, ...]) -> None:
    """ShapeMismatch if a layer has another size in the base than in an input."""
    shape = base.slot_shape(pieces)
    size = (shape[0] if shape else 1, math.prod(shape[1:]))
    for term in task.terms:
        _same_size(task, term.job, size, base.source.path.name)


def _same_size(task: Task, job: Assembly, size: tuple[int, int], name: str) -> None:
    own = _size(job)
    if any(a and b and a != b for a, b in zip(size, own, strict=True)):
        here, there = ("{} × {}".format(*(n or "?" for n in s)) for s in (own, size))
        raise ShapeMismatch(
            f"{task.label} is {here} in this adapter, {there} in {name}",
            hint="their models differ in size; see `adaptkit inspect --modules`",
            file=job.adapter.source.path,
        )


def _size(job: Assembly) -> tuple[int, int]:
    """(rows, columns) that an adapter gives to a slot; 0 if its tensors do not tell."""
    heights = [
        part.rows
        if part.entry is None
        else part.cut[1] - part.cut[0]
        if part.cut
        else part.entry.facts.rows
        for part in job.parts
    ]
    columns = {entry.facts.columns for entry in job.entries}
    return (sum(heights) if all(heights) else 0), (columns.pop() if len(columns) == 1 else 0)
