"""Steps of one or several merges into one base, with the memory of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.checkpoint import Piece
from adaptkit.files.header import DTYPES, nbytes
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.names import Slot
    from adaptkit.ops.merge.plan import Plan, TensorMerge

__all__ = [
    "BLOCK",
    "VERIFIED",
    "JointMerge",
    "block_rows",
    "by_rows",
    "combined",
    "reused",
    "square",
    "step_of",
    "turned",
    "verifying",
]


WIDE = ("F32", "F64")  # dtypes that are computed with as they are stored
# entries compared at a time: half a megabyte in float64, which stays in the cache
VERIFIED = 1 << 16
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
    own -= _spared([merge], base)
    factors = sum(_factors(merge, adapters).values())
    return Step(
        merge, _shape(merge, base, adapters), shared + own + factors, base.source.order(merge.name)
    )


def verifying(
    step: Step[TensorMerge], base: Checkpoint, adapters: Sequence[Adapter]
) -> Step[TensorMerge]:
    """Return the step that compares a merged tensor with W + ΔW in float64."""
    merge, info = step.payload, base.source.infos[step.payload.name]
    added = [c for c in merge.contributions if c.strength]
    size = info.nbytes + nbytes(merge.dtype, info.shape)
    blocks = 64 * min(info.numel, VERIFIED)
    for c in added:
        infos = [adapters[c.adapter].source.infos[key] for _, key in c.entry.tensors()]
        wide = 8 if c.entry.kind.dense else 16  # stored, in float64, and scaled
        size += sum(one.nbytes + wide * one.numel for one in infos)
        size += 17 * base.nbytes(c.slot) if c.slot else 0
    kinds = [c.entry.kind for c in added]
    if not all(kind.by_rows or kind.row_wise for kind in kinds):
        applying = max(k.applying_wide * k.applying(*_matrix(info.shape)) for k in kinds)
        size, blocks = size + 8 * info.numel, max(blocks, applying)
    if turned(merge, base):
        size += 32 * info.numel
    if merge.packed is not None:  # the numbers that it stands for, and what each may be off
        size += 8 * info.numel
    return replace(step, bytes=size + blocks)


def turned(merge: TensorMerge, base: Checkpoint) -> bool:
    """Whether the checkpoint stores a tensor transposed, or its halves in the other order."""
    place = base.places.get(merge.name)
    return place is not None and (place.transposed or place.swapped)


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
    computed = [step.payload for _, step in steps]
    if not at_once:
        own -= _spared(computed, plans[0].base)
    if len(computed) > 1 and computed[0].packed is not None:  # W for the outputs that follow
        shared += 4 * plans[0].base.source.infos[name].numel
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
    without factors. A packed weight is decoded once more in the end, in pieces.
    """
    info = base.source.infos[merge.name]
    own = nbytes(merge.dtype, info.shape)
    kinds = [c.entry.kind for c in merge.contributions if c.strength]
    if at_once and by_rows(merge, base, at_once=True):
        return info.nbytes + 12 * info.numel, own  # W', ΔW of kinds without factors, W' - W
    if not at_once and by_rows(merge, base):
        rows, columns = _matrix(info.shape)
        block = 4 * block_rows(rows, columns) * columns
        some = block_rows(rows, columns), columns
        beside = max((kind.applying(*some) for kind in kinds if not kind.by_rows), default=0)
        if any(kind.by_rows for kind in kinds):
            beside = max(beside, block)  # their ΔW
        return info.nbytes + 3 * block + beside, min(own, block)
    # a layer that is applied to as a whole: read, wide, and changed
    own += sum(9 * base.nbytes(c.slot) for c in merge.contributions if c.slot)
    dense = max((kind.applying(*_matrix(info.shape)) for kind in kinds), default=0)
    if merge.packed is not None:  # read once more, with what stays the same, to be packed
        beside = max(dense, info.numel + info.nbytes + merge.packed.unpacking_bytes)
    else:
        beside = max(dense, 16 * min(info.numel, BLOCK))  # blocks are measured in the end
    return info.nbytes + 4 * info.numel + beside, own


def reused(merge: TensorMerge, base: Checkpoint) -> bool:
    """Whether a tensor that is merged as a whole may take the place of W as it was read."""
    info = base.source.infos[merge.name]
    plain = merge.scale is None and merge.packed is None
    return plain and info.dtype == merge.dtype and DTYPES[info.dtype] > 8


def _spared(merges: Sequence[TensorMerge], base: Checkpoint) -> int:
    """Return the bytes of the output that takes the place of W: that of the last of all."""
    if any(by_rows(merge, base) or not reused(merge, base) for merge in merges):
        return 0
    return nbytes(merges[-1].dtype, base.source.infos[merges[-1].name].shape)


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


def by_rows(merge: TensorMerge, base: Checkpoint, *, at_once: bool = False) -> bool:
    """Return whether a tensor is merged in blocks of rows; some need the whole weight.

    `at_once` on a device: as a stack of whole tensors to which ΔW is added.
    """
    info = base.source.infos[merge.name]
    # fp8 has its own decoding and rounding
    decoded = merge.scale is not None or base.quantization.widens(info)
    if decoded or min(DTYPES[info.dtype], DTYPES[merge.dtype]) <= 8 or not info.shape:
        return False
    if turned(merge, base):
        return False
    added = [c for c in merge.contributions if c.strength]
    return all(
        not c.entry.swapped
        and (c.entry.kind.by_rows or (c.entry.kind.row_wise and not c.slot and not at_once))
        for c in added
    )


def square(x: Tensor) -> float:
    """‖x‖² of any shape."""
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(x.unsqueeze(0)))
