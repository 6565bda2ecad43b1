"""The kernel of a merge: all adapters of a weight added in float32 and rounded once, for one output or several at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.checkpoint import exchanged
from adaptkit.engine import Step
from adaptkit.errors import NonFinite
from adaptkit.files.header import DTYPES, nbytes
from adaptkit.ops._common import torch_dtype
from adaptkit.ops._requantise import quantised, widened

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms._weights import Weights
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.files.header import TensorInfo
    from adaptkit.ops._merging import Job, Plan

__all__ = ["Blender", "Merged", "Task", "combined", "step_of"]

BLOCK = 1 << 19  # entries added to at a time: three blocks of float32, which stay in the cache
LARGEST = 1 << 22  # entries that a block may have where a kind can only be cut between its own blocks


@dataclass(frozen=True)
class Task:
    """One tensor of the base and what becomes of it in each output; None where an output copies it."""

    name: str
    jobs: tuple[Job | None, ...]


@dataclass(frozen=True)
class Merged:
    """A merged tensor as stored (with its scale), ‖W‖², ‖ΔW‖² and the ‖·‖² lost to its rounding."""

    tensor: Tensor
    scale: Tensor | None
    weight: float
    delta: float
    rounding: float


# planning: no torch from here to Blender ------------------------------------------------------------------------------


def step_of(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> Step[Job]:
    """The step of one job; its bytes are those of one output."""
    shared, own = _sizes(job, base, adapters)
    return Step(job, _shape(job, base, adapters), shared + own, base.source.order(job.name))


def combined(plans: Sequence[Plan]) -> tuple[Step[Task], ...]:
    """One step for each tensor that any of these outputs on one base does not copy."""
    base = plans[0].base
    found: dict[str, list[tuple[int, Step[Job]]]] = {}
    for number, plan in enumerate(plans):
        for step in plan.steps:
            found.setdefault(step.payload.name, []).append((number, step))
    return tuple(_combined(name, steps, plans) for name in base.source.infos if (steps := found.get(name)))


def _combined(name: str, steps: Sequence[tuple[int, Step[Job]]], plans: Sequence[Plan]) -> Step[Task]:
    jobs: list[Job | None] = [None] * len(plans)
    own, shared = 0, 0
    for number, step in steps:
        plan = plans[number]
        sizes = _sizes(step.payload, plan.base, plan.adapters)
        shared, own = max(shared, sizes[0]), own + sizes[1]
        jobs[number] = step.payload
    shape = tuple((number, step.shape) for number, step in steps)
    return Step(Task(name, tuple(jobs)), shape, shared + own, steps[0][1].order)


def _sizes(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[int, int]:
    """Bytes that all outputs of a tensor share, and those that each needs for itself: the result and the factors.

    In blocks of rows that is W as stored and three blocks. Else W in float32 and, for a kind without factors, its dense ΔW;
    scaled weights are kept as they were read, and widened once more to see what rounding did.
    """
    info = base.source.infos[job.name]
    own = nbytes(job.dtype, info.shape) + 5 * sum(i.nbytes for _, _, i in _factors(job, adapters))
    apart = row_step(job, base, adapters)
    if apart is not None:
        return info.nbytes + 3 * 4 * min(info.numel, max(BLOCK, apart * _columns(info.shape))), own
    kinds = ((c.entry.facts.rank, c.entry.kind.name) for c in job.contributions if c.strength)
    dense = max((0 if rank and kind == "lora" else 4 * info.numel for rank, kind in kinds), default=0)
    scaled = 8 * info.numel if base.quantization.widens(info) else 0
    return info.nbytes + 4 * info.numel + dense + scaled, own


def _factors(job: Job, adapters: Sequence[Adapter]) -> list[tuple[int, str, TensorInfo]]:
    return [
        (c.adapter, role, adapters[c.adapter].source.infos[key])
        for c in job.contributions
        if c.strength
        for role, key in c.entry.tensors()
    ]


def _shape(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[object, ...]:
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
        tuple((a, role, i.shape, i.dtype) for a, role, i in _factors(job, adapters)),
    )


def _columns(shape: Sequence[int]) -> int:
    return math.prod(shape[1:]) if len(shape) > 1 else 1


def row_step(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> int | None:
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
            shapes = {role: adapters[c.adapter].source.infos[key].shape for role, key in c.entry.tensors()}
            own = None if c.entry.swapped else c.entry.kind.row_step(shapes, c.entry.facts)
            if own is None or (own > 1 and c.rows is not None):
                return None
            step = math.lcm(step, own)
    return step if step * _columns(info.shape) <= LARGEST else None


# computing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Weights to add to rows [start, stop) of a tensor."""

    weights: Weights
    strength: float
    start: int
    stop: int

    def add(self, rows: Tensor, start: int) -> None:
        """Onto `rows` (..., k, n), which begin at row `start` of the tensor."""
        first, last = max(start, self.start), min(start + rows.shape[-2], self.stop)
        if first >= last:
            return
        whole = (first, last) == (self.start, self.stop)
        weights = self.weights if whole else self.weights.part(first - self.start, last - self.start)
        view = rows[..., first - start : last - start, :]
        applied = weights.apply(view, self.strength)
        if applied is not view:
            view.copy_(applied)


class Blender:
    """Reads and merges the tensors of several plans on one base; a plan by itself is one of one."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        self.base = plans[0].base

    def load(self, task: Task) -> dict[str, Tensor]:
        """The weight, its scale, and the factors of every output."""
        loaded = {"base": self.base.source.read(task.name)}
        if (key := self.base.quantization.scales.get(task.name)) is not None:
            loaded["scale"] = self.base.source.read(key)
        for number, job in enumerate(task.jobs):
            for n, c in enumerate(job.contributions if job else ()):
                stored = self.plans[number].adapters[c.adapter].read(c.entry) if c.strength else {}
                loaded |= {f"{number}/{n}/{role}": tensor for role, tensor in stored.items()}
        return loaded

    def blend(self, tasks: Sequence[Task], tensors: dict[str, Tensor]) -> list[list[Merged | None]]:
        """All adapters of a tensor are applied in float32 (float64 for such a base), then rounded once.

        Tasks are of equal shapes and contributions; the tensors of all are stacked. For each task what each output gets.
        """
        stored, scale = tensors.pop("base"), tensors.pop("scale", None)
        found: list[list[Merged | None]] = [[None] * len(self.plans) for _ in tasks]
        whole: list[int] = []
        rows: list[int] = []
        for number, job in enumerate(tasks[0].jobs):
            if job is not None:
                plan = self.plans[number]
                (whole if row_step(job, plan.base, plan.adapters) is None else rows).append(number)
        for number in whole:
            for n, merged in enumerate(self._whole(number, tasks, tensors, stored, scale)):
                found[n][number] = merged
        if rows:  # last, as the weight as stored may be used up
            for number, merged_tasks in zip(rows, self._by_rows(rows, tasks, tensors, stored), strict=True):
                for n, merged in enumerate(merged_tasks):
                    found[n][number] = merged
        return found

    def _parts(self, number: int, job: Job, tensors: Mapping[str, Tensor], rows: int) -> Iterator[_Part]:
        """What this output adds, with factors in their compute dtype."""
        from adaptkit.linalg.precision import upcast

        for n, c in enumerate(job.contributions):
            if c.strength:
                roles = {role: upcast(tensors[f"{number}/{n}/{role}"]) for role, _ in c.entry.tensors()}
                weights = c.entry.decode(roles)
                if c.cut is not None:
                    weights = weights.part(*c.cut)
                start, stop = c.rows or (0, rows)
                yield _Part(weights, c.strength, start, stop)

    # in blocks of rows

    def _by_rows(
        self, numbers: Sequence[int], tasks: Sequence[Task], tensors: Mapping[str, Tensor], stored: Tensor
    ) -> list[list[Merged]]:
        """For each output its merged tensors: no full-size copy in float32 is made, and the last output takes the place of
        the weight as it was read."""
        import torch

        from adaptkit.linalg.precision import compute_dtype, empty, norm_squared

        flat = stored.reshape(*stored.shape[:2], -1)
        batch, m, n = flat.shape
        outputs, step = [], 1
        for number in numbers:
            job, plan = _given(tasks[0].jobs[number]), self.plans[number]
            step = math.lcm(step, row_step(job, plan.base, plan.adapters) or 1)
            dtype = torch_dtype(job.dtype)
            mine = number == numbers[-1] and dtype == stored.dtype and stored.is_contiguous()
            out = flat if mine else empty(flat.shape, dtype, flat.device)
            outputs.append((out, list(self._parts(number, job, tensors, m))))
        k = min(m, max(step, BLOCK // n // step * step))
        wide = compute_dtype(stored)
        old, new, spare = (empty((batch, k, n), wide, flat.device) for _ in range(3))
        weight = torch.zeros(batch, dtype=torch.float64)
        sums = torch.zeros(len(numbers), 2, batch, dtype=torch.float64)
        for start in range(0, m, k):
            stop = min(m, start + k)
            before, after, rest = (block[:, : stop - start] for block in (old, new, spare))
            before.copy_(flat[:, start:stop])
            weight += norm_squared(before).cpu()
            for (out, parts), both in zip(outputs, sums, strict=True):
                after.copy_(before)
                for part in parts:
                    part.add(after, start)
                both[0] += norm_squared(torch.sub(after, before, out=rest)).cpu()
                both[1] += norm_squared(rest.copy_(out[:, start:stop].copy_(after)).sub_(after)).cpu()
        return [
            [
                self._checked(number, task, out[i].reshape(stored.shape[1:]), (weight[i], *sums[place, :, i]))
                for i, task in enumerate(tasks)
            ]
            for place, (number, (out, _)) in enumerate(zip(numbers, outputs, strict=True))
        ]

    def _checked(self, number: int, task: Task, tensor: Tensor, sums: Sequence[Tensor]) -> Merged:
        weight, delta, rounding = (float(value) for value in sums)
        job = _given(task.jobs[number])
        if not math.isfinite(delta):
            raise self._non_finite(number, job)
        if not math.isfinite(rounding):
            raise self._too_large(number, job)
        return Merged(tensor.cpu(), None, weight, delta, rounding)

    # as a whole

    def _whole(
        self, number: int, tasks: Sequence[Task], tensors: Mapping[str, Tensor], stored: Tensor, scale: Tensor | None
    ) -> list[Merged]:
        wide = widened(stored, scale)
        # what ΔW is measured from: the numbers that were meant, not their codes
        before = wide.clone() if scale is not None or stored.dtype.itemsize == 1 else stored
        matrix = wide.reshape(*wide.shape[:2], -1) if wide.ndim > 1 else wide.reshape(-1, 1, 1)
        self._add(number, _given(tasks[0].jobs[number]), matrix, tensors)
        scales = [None] * len(tasks) if scale is None else list(scale)
        return [
            self._finished(number, _given(task.jobs[number]), wide[n], before[n], scales[n])
            for n, task in enumerate(tasks)
        ]

    def _add(self, number: int, job: Job, matrix: Tensor, tensors: Mapping[str, Tensor]) -> None:
        place = self.base.places.get(job.name)
        if place is None:
            return
        view = matrix.transpose(-1, -2) if place.transposed else matrix
        view = exchanged(matrix, -2) if place.swapped else view
        for part in self._parts(number, job, tensors, view.shape[-2]):
            part.add(view, 0)
        if place.swapped:
            matrix.copy_(exchanged(view, -2))

    def _finished(self, number: int, job: Job, merged: Tensor, stored: Tensor, scale: Tensor | None) -> Merged:
        rounded, scale, back = self._rounded(number, job, merged, scale)
        weight, delta, rounding = 0.0, 0.0, 0.0
        for old, new, out in _chunks(stored, merged, back):
            weight += _square(old)
            delta += _square(new - old)
            rounding += _square(out.to(new.dtype) - new)
        if not math.isfinite(delta):
            raise self._non_finite(number, job)
        if not math.isfinite(rounding):
            raise self._too_large(number, job)
        return Merged(rounded.cpu(), None if scale is None else scale.cpu(), weight, delta, rounding)

    def _rounded(
        self, number: int, job: Job, merged: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(as stored, its new scale if it has one, the numbers that these mean)."""
        from adaptkit.linalg.precision import cast

        if job.scale is not None and scale is not None:
            rounded, fresh = quantised(merged, scale, job.dtype)
            return rounded, fresh, widened(rounded.unsqueeze(0), fresh.unsqueeze(0))[0]
        target = torch_dtype(job.dtype)
        try:  # fp8 clamps where the others overflow, which shows in the sums
            rounded = cast(merged, target) if target.itemsize == 1 else merged.to(target)
        except NonFinite:
            raise self._too_large(number, job) from None
        return rounded, None, rounded

    # errors

    def _too_large(self, number: int, job: Job) -> NonFinite:
        return NonFinite(
            f"the merged weight does not fit {str(torch_dtype(job.dtype)).removeprefix('torch.')}",
            hint="lower the strength, or write with --dtype bf16 or fp32",
            file=self.plans[number].output,
            tensor=job.name,
        )

    def _non_finite(self, number: int, job: Job) -> NonFinite:
        """Who holds it, by reading once more."""
        import torch

        plan = self.plans[number]
        if not bool(torch.isfinite(self.base.source.read(job.name)).all()):
            return NonFinite("holds NaN or infinity", file=self.base.source.path, tensor=job.name)
        for c in job.contributions:
            adapter = plan.adapters[c.adapter]
            for _, key in c.entry.tensors():
                if not bool(torch.isfinite(adapter.source.read(key)).all()):
                    return NonFinite("holds NaN or infinity", file=adapter.source.path, tensor=key)
        return NonFinite("the merged weight overflows", file=plan.output, tensor=job.name)


def _given(job: Job | None) -> Job:
    assert job is not None
    return job


def _square(x: Tensor) -> float:
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(x.unsqueeze(0)))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        first, *rest = (t[start : start + BLOCK] for t in flat)
        yield first.to(rest[0].dtype), *rest
