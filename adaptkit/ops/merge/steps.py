"""Steps of one or several merges into one base, with the memory of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.checkpoint import Piece
from adaptkit.files.header import DTYPES, nbytes
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.names import Slot
    from adaptkit.ops.merge.plan import Plan, TensorMerge

__all__ = ["JointMerge", "block_rows", "by_rows", "chunks", "combined", "square", "step_of"]


WIDE = ("F32", "F64")  # dtypes that are computed with as they are stored
# entries merged at a time: three such blocks of float32 stay in the cache
BLOCK = 1 << 19


@dataclass(frozen=True)
class JointMerge:
    """One tensor of the base with its merge for each output.

    A merge is None if that output copies the tensor. `sources` numbers the stored entry of each
    contribution per output; outputs that add the same entry share its number.
    """

    name: str
    merges: tuple[TensorMerge | None, ...]
    sources: tuple[tuple[int, ...], ...]


def step_of(merge: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> Step[TensorMerge]:
    """Return the step of one merge for a single output."""
    shared, own = _sizes(merge, base)
    factors = sum(_factors(merge, adapters).values())
    return Step(
        merge, _shape(merge, base, adapters), shared + own + factors, base.source.order(merge.name)
    )


def combined(plans: Sequence[Plan], *, at_once: bool = False) -> tuple[Step[JointMerge], ...]:
    """Return one step per tensor that at least one output computes.

    `at_once` on devices that get whole tensors, not blocks of rows.
    """
    base = plans[0].base
    found: dict[str, list[tuple[int, Step[TensorMerge]]]] = {}
    for number, plan in enumerate(plans):
        for step in plan.steps:
            found.setdefault(step.payload.name, []).append((number, step))
    return tuple(
        _combined(name, steps, plans, at_once)
        for name in base.source.infos
        if (steps := found.get(name))
    )


def _combined(
    name: str,
    steps: Sequence[tuple[int, Step[TensorMerge]]],
    plans: Sequence[Plan],
    at_once: bool,
) -> Step[JointMerge]:
    merges: list[TensorMerge | None] = [None] * len(plans)
    own, shared = 0, 0
    factors: dict[tuple[Path, Slot], int] = {}
    for number, step in steps:
        plan = plans[number]
        sizes = _sizes(step.payload, plan.base, at_once=at_once)
        shared, own = max(shared, sizes[0]), own + sizes[1]
        factors |= _factors(step.payload, plan.adapters)
        merges[number] = step.payload
    sources = _sources(merges, plans)
    shape = sources, tuple((number, step.shape) for number, step in steps)
    size = shared + own + sum(factors.values())
    read = plans[0].base.source.infos[name].nbytes + sum(factors.values())
    return Step(
        JointMerge(name, tuple(merges), sources),
        shape,
        size,
        steps[0][1].order,
        read + own if at_once else size,
    )


def _sources(
    merges: Sequence[TensorMerge | None], plans: Sequence[Plan]
) -> tuple[tuple[int, ...], ...]:
    known: dict[tuple[Path, Slot], int] = {}
    return tuple(
        tuple(
            known.setdefault((plan.adapters[c.adapter].source.path, c.entry.slot), len(known))
            for c in (merge.contributions if merge else ())
        )
        for merge, plan in zip(merges, plans, strict=True)
    )


def _sizes(merge: TensorMerge, base: Checkpoint, *, at_once: bool = False) -> tuple[int, int]:
    """Return the bytes that all outputs of a tensor share, and the bytes of each output.

    A tensor in blocks of rows needs W as stored and four shared blocks, and one block per output.
    A whole tensor needs W as stored and in float32, the result, and the dense ΔW of an algorithm
    without factors. Scaled weights are also kept as read and decoded to measure the rounding.
    """
    info = base.source.infos[merge.name]
    own = nbytes(merge.dtype, info.shape)
    if by_rows(merge, base) and at_once:
        return info.nbytes + 12 * info.numel, own  # W', ΔW of kinds without factors, W' - W
    if by_rows(merge, base):
        rows, columns = _matrix(info.shape)
        block = 4 * block_rows(rows, columns) * columns
        return info.nbytes + 4 * block, min(own, block)
    kinds = (c.entry.kind for c in merge.contributions if c.strength)
    # a layer that is applied to as a whole: read, wide, and changed
    own += sum(9 * base.nbytes(c.slot) for c in merge.contributions if c.slot)
    dense = max((kind.applying(info.numel) for kind in kinds), default=0)
    scaled = 8 * info.numel if base.quantization.widens(info) else 0
    return info.nbytes + 4 * info.numel + dense + scaled, own


def _factors(merge: TensorMerge, adapters: Sequence[Adapter]) -> dict[tuple[Path, Slot], int]:
    """Return the bytes of each added entry, as stored, widened, and scaled unless it is dense."""
    found = {}
    for c in merge.contributions:
        if c.strength:
            source = adapters[c.adapter].source
            infos = [source.infos[key] for _, key in c.entry.tensors()]
            found[source.path, c.entry.slot] = sum(
                info.nbytes + 4 * info.numel * ((info.dtype not in WIDE) + (not c.entry.kind.dense))
                for info in infos
            )
    return found


def _shape(merge: TensorMerge, base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[object, ...]:
    """Return what the members of a batch have in common: all that decides what is computed."""
    added = tuple(
        (
            replace(c, entry=None, label="", slot=()),  # type: ignore[arg-type]
            c.entry.likeness(adapters[c.adapter].source.infos),
            base.likeness(c.slot),
        )
        for c in merge.contributions
        if c.strength
    )
    place = base.places.get(merge.name)
    lies = None if place is None else (place.transposed, place.swapped)
    return base.likeness([Piece(merge.name)]), lies, merge.dtype, merge.scale is None, added


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a tensor that is merged in blocks of rows."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def block_rows(rows: int, columns: int) -> int:
    """Return the number of rows of a block."""
    return max(1, min(rows, BLOCK // max(columns, 1)))


def by_rows(merge: TensorMerge, base: Checkpoint) -> bool:
    """Return whether a tensor is merged in blocks of rows; some need the whole weight."""
    info, place = base.source.infos[merge.name], base.places.get(merge.name)
    # fp8 has its own decoding and rounding
    decoded = merge.scale is not None or base.quantization.widens(info)
    if decoded or min(DTYPES[info.dtype], DTYPES[merge.dtype]) <= 8 or not info.shape:
        return False
    if place is not None and (place.transposed or place.swapped):
        return False
    added = [c.entry for c in merge.contributions if c.strength]
    return all(entry.kind.by_rows and not entry.swapped for entry in added)


def square(x: Tensor) -> float:
    """‖x‖² of any shape."""
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(x.unsqueeze(0)))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one size, some numbers at a time, the first in the dtype of the second."""
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        first, *rest = (t[start : start + BLOCK] for t in flat)
        yield first.to(rest[0].dtype), *rest
