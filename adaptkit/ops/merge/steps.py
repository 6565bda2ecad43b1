"""merge: the steps of one or several merges into one base, and the memory each needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.engine import Step
from adaptkit.files.header import DTYPES, nbytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.names import Slot
    from adaptkit.ops.merge.plan import Plan, TensorMerge

__all__ = ["BLOCK", "JointMerge", "combined", "row_step", "step_of"]


BLOCK = 1 << 19  # entries added to at a time: three blocks of float32, which stay in the cache


LARGEST = (
    1 << 22
)  # entries that a block may have where a kind can only be cut between its own blocks


@dataclass(frozen=True)
class JointMerge:
    """One tensor of the base and what becomes of it in each output; None where an output copies it.

    `sources`: for each output, which stored entry each contribution is; outputs that add the same one share its number.
    """

    name: str
    jobs: tuple[TensorMerge | None, ...]
    sources: tuple[tuple[int, ...], ...]


def step_of(job: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> Step[TensorMerge]:
    """The step of one job; its bytes are those of one output."""
    shared, own = _sizes(job, base, adapters)
    factors = sum(_factors(job, adapters).values())
    return Step(
        job, _shape(job, base, adapters), shared + own + factors, base.source.order(job.name)
    )


def combined(plans: Sequence[Plan]) -> tuple[Step[JointMerge], ...]:
    """One step for each tensor that any of these outputs on one base does not copy."""
    base = plans[0].base
    found: dict[str, list[tuple[int, Step[TensorMerge]]]] = {}
    for number, plan in enumerate(plans):
        for step in plan.steps:
            found.setdefault(step.payload.name, []).append((number, step))
    return tuple(
        _combined(name, steps, plans) for name in base.source.infos if (steps := found.get(name))
    )


def _combined(
    name: str, steps: Sequence[tuple[int, Step[TensorMerge]]], plans: Sequence[Plan]
) -> Step[JointMerge]:
    jobs: list[TensorMerge | None] = [None] * len(plans)
    own, shared = 0, 0
    factors: dict[tuple[Path, Slot], int] = {}
    for number, step in steps:
        plan = plans[number]
        sizes = _sizes(step.payload, plan.base, plan.adapters)
        shared, own = max(shared, sizes[0]), own + sizes[1]
        factors |= _factors(step.payload, plan.adapters)
        jobs[number] = step.payload
    sources = _sources(jobs, plans)
    shape = sources, tuple((number, step.shape) for number, step in steps)
    return Step(
        JointMerge(name, tuple(jobs), sources),
        shape,
        shared + own + sum(factors.values()),
        steps[0][1].order,
    )


def _sources(
    jobs: Sequence[TensorMerge | None], plans: Sequence[Plan]
) -> tuple[tuple[int, ...], ...]:
    known: dict[tuple[Path, Slot], int] = {}
    return tuple(
        tuple(
            known.setdefault((plan.adapters[c.adapter].source.path, c.entry.slot), len(known))
            for c in (job.contributions if job else ())
        )
        for job, plan in zip(jobs, plans, strict=True)
    )


def _sizes(job: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[int, int]:
    """Bytes that all outputs of a tensor share, and those that each needs for itself.

    In blocks of rows that is W as stored and four blocks, and one block. Else the result, and W in float32 and, for a kind
    without factors, its dense ΔW; scaled weights are kept as they were read, and widened once more to see what rounding did.
    """
    info = base.source.infos[job.name]
    own = nbytes(job.dtype, info.shape)
    apart = row_step(job, base, adapters)
    if apart is not None:
        block = 4 * min(info.numel, max(BLOCK, apart * _columns(info.shape)))
        return info.nbytes + 4 * block, min(own, block)
    kinds = (c.entry.kind for c in job.contributions if c.strength)
    dense = max((0 if kind.applies_in_place else 4 * info.numel for kind in kinds), default=0)
    scaled = 8 * info.numel if base.quantization.widens(info) else 0
    return info.nbytes + 4 * info.numel + dense + scaled, own


def _factors(job: TensorMerge, adapters: Sequence[Adapter]) -> dict[tuple[Path, Slot], int]:
    """Bytes of each entry that is added, as stored and widened."""
    found = {}
    for c in job.contributions:
        if c.strength:
            source = adapters[c.adapter].source
            found[source.path, c.entry.slot] = 5 * sum(
                source.infos[key].nbytes for _, key in c.entry.tensors()
            )
    return found


def _shape(job: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[object, ...]:
    """What the members of a batch have in common."""
    info = base.source.infos[job.name]
    contents = tuple(
        (c.entry.kind.name, c.rows, c.cut, c.entry.facts.scale, c.adapter, c.strength)
        for c in job.contributions
        if c.strength
    )
    place = base.places.get(job.name)
    return (
        info.shape,
        info.dtype,
        job.dtype,
        place is not None and (place.transposed, place.swapped),
        (key := base.quantization.scales.get(job.name)) and base.source.infos[key].shape,
        contents,
        tuple(
            (c.adapter, role, (i := adapters[c.adapter].source.infos[key]).shape, i.dtype)
            for c in job.contributions
            if c.strength
            for role, key in c.entry.tensors()
        ),
    )


def _columns(shape: Sequence[int]) -> int:
    return math.prod(shape[1:]) if len(shape) > 1 else 1


def row_step(job: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> int | None:
    """How many rows belong together where a merge may go through blocks of rows; None where it needs the whole weight."""
    info, place = base.source.infos[job.name], base.places.get(job.name)
    bits = DTYPES[info.dtype], DTYPES[job.dtype]
    if job.scale is not None or base.quantization.widens(info) or min(bits) <= 8 or not info.shape:
        return None  # fp8 is widened and rounded by rules of its own
    if place is not None and (place.transposed or place.swapped):
        return None
    step = 1
    for c in job.contributions:
        if c.strength:
            shapes = {
                role: adapters[c.adapter].source.infos[key].shape for role, key in c.entry.tensors()
            }
            own = None if c.entry.swapped else c.entry.kind.row_step(shapes, c.entry.facts)
            if own is None or (own > 1 and c.rows is not None):
                return None
            step = math.lcm(step, own)
    return step if step * _columns(info.shape) <= LARGEST else None
