"""merge: bake adapters into a checkpoint, streaming; what no adapter touches is copied as bytes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.adapter import Adapter, Entry
from adaptkit.checkpoint import Checkpoint, Piece, exchanged
from adaptkit.engine import Step, check_memory, peak_memory
from adaptkit.errors import NonFinite, NothingToDo, NotRepresentable, ShapeMismatch
from adaptkit.files.header import TensorSpec
from adaptkit.ops._common import (
    FLOATS,
    Progress,
    Shared,
    Unused,
    WriterReport,
    check_output,
    default_output,
    refuse_unused,
    selected,
    stored_dtype,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.files.sink import TensorSink
    from adaptkit.names import Slot

__all__ = ["Options", "Plan", "Report", "plan", "run"]

ROW_CHUNK = 1 << 20  # elements compared at a time when measuring what a merge changed


@dataclass(frozen=True)
class Options(Shared):
    """Options of a merge (those every verb shares)."""


@dataclass(frozen=True)
class Contribution:
    """One entry of one adapter, on all rows of a tensor (`rows` None) or some; `cut`: only these rows of the entry."""

    adapter: int
    entry: Entry
    rows: tuple[int, int] | None
    cut: tuple[int, int] | None
    label: str


@dataclass(frozen=True)
class Job:
    """One tensor of the base and all that is added to it."""

    name: str
    dtype: str
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Plan:
    """Everything known before a weight is read. `strengths` go with `adapters`."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    options: Options
    output: Path
    jobs: tuple[Job, ...]
    specs: tuple[TensorSpec, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[Job], ...]

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        return {
            "output": str(self.output),
            "family": self.base.family.name,
            "modules": sum(len(job.contributions) for job in self.jobs),
            "tensors_changed": len(self.jobs),
            "tensors_copied": len(self.specs) - len(self.jobs),
            "bytes_in": self.base.source.size + sum(adapter.source.size for adapter in self.adapters),
            "bytes_out": sum(_spec_bytes(spec) for spec in self.specs),
            "peak_memory": peak_memory(self.steps, self.options.memory),
            "device": self.options.device,
            "adapters": self.described(),
            "unused": [item.to_dict() for item in self.unused],
            "details": [
                {"module": c.label, "tensor": job.name, "algorithm": c.entry.kind.name, "rank": c.entry.facts.rank}
                for job in self.jobs
                for c in job.contributions
            ],
        }

    def described(self) -> list[dict[str, Any]]:
        """The adapters: path, format, strength, how many of their modules apply."""
        counts = [
            sum(c.adapter == n for job in self.jobs for c in job.contributions) for n in range(len(self.adapters))
        ]
        return [
            {"path": str(a.source.path), "format": a.format.name, "strength": s, "modules": n}
            for a, s, n in zip(self.adapters, self.strengths, counts, strict=True)
        ]

    def close(self) -> None:
        """Close all inputs."""
        self.base.close()
        for adapter in self.adapters:
            adapter.close()


@dataclass(frozen=True, kw_only=True)
class Report(WriterReport):
    """What was merged: `changed` tensors that differ from the base, and ‖ΔW‖/‖W‖ over the touched ones."""

    family: str
    adapters: tuple[Mapping[str, Any], ...]
    tensors: int
    changed: int
    relative_change: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "adapters": [dict(item) for item in self.adapters],
            "tensors": self.tensors,
            "tensors_changed": self.changed,
            "relative_change": self.relative_change,
        }
        return {**super().to_dict(), **extra}


@dataclass(frozen=True)
class _Merged:
    """A merged tensor as stored, with ‖W‖², ‖ΔW‖² and the ‖·‖² lost to its rounding."""

    tensor: Tensor
    weight: float
    delta: float
    rounding: float


def plan(base: Path, adapters: Sequence[tuple[Path, float]], options: Options) -> Plan:
    """Find the place of every adapter module in the base; reads headers only, and fails here if anything can."""
    output = options.output or default_output(base, "merged")
    check_output(output, options.overwrite)
    checkpoint = Checkpoint.open(base, family=options.family)
    opened = _open_adapters(checkpoint, [path for path, _ in adapters], options)
    places = _Places(checkpoint, opened, options)
    jobs = places.jobs()
    for adapter, lost in zip(opened, places.unused, strict=True):
        refuse_unused(lost, options.allow_unused, adapter.source.path)
    if not jobs:
        raise NothingToDo(
            "no module of these adapters applies to this checkpoint", hint="see --only and --skip", file=base
        )
    touched = {job.name: job for job in jobs}
    specs = tuple(
        TensorSpec(info.name, touched[info.name].dtype if info.name in touched else info.dtype, info.shape)
        for info in checkpoint.source.infos.values()
    )
    steps = tuple(_step(job, checkpoint, opened) for job in jobs)
    check_memory(steps, options.memory)
    strengths = tuple(strength for _, strength in adapters)
    unused = tuple(item for items in places.unused for item in items)
    return Plan(checkpoint, opened, strengths, options, output, jobs, specs, unused, steps)


def _open_adapters(base: Checkpoint, paths: Sequence[Path], options: Options) -> tuple[Adapter, ...]:
    if base.source.path.is_dir() and not _single_names(base):
        raise NotRepresentable(
            "merging into a diffusers folder is not supported yet",
            hint="merge into one of its parts (for example its unet folder) or a single-file checkpoint",
            file=base.source.path,
        )
    return tuple(_open_adapter(base, path, options) for path in paths)


def _single_names(base: Checkpoint) -> bool:
    """Whether the names are those inside the files: not prefixed with the folders of a pipeline."""
    folders = tuple(f"{part.name}." for part in base.family.components)
    return not any(name.startswith(folders) for name in base.source.infos)


def _open_adapter(base: Checkpoint, path: Path, options: Options) -> Adapter:
    adapter = Adapter.open(path, format=options.format)
    family = base.family.name
    if adapter.family.name != family and family in adapter.detection.alternatives:
        adapter.close()
        adapter = Adapter.open(path, family=family, format=options.format)
    if adapter.family.name != family:
        adapter.close()
        raise ShapeMismatch(
            f"this adapter is for {adapter.family.title}, the checkpoint is {base.family.title}",
            hint="see `adaptkit inspect` on both",
            file=path,
        )
    return adapter


class _Places:
    """Finds where each entry applies; what finds no place goes to `unused`, per adapter."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], options: Options) -> None:
        self.base, self.adapters, self.options = base, adapters, options
        self.held = base.targets()
        self.unused: list[list[Unused]] = [
            [Unused(key, reason) for key, reason in adapter.unclaimed.items()] for adapter in adapters
        ]
        self.found: dict[str, list[Contribution]] = {}

    def jobs(self) -> tuple[Job, ...]:
        for number, adapter in enumerate(self.adapters):
            for slot, entry in adapter.entries.items():
                if selected(adapter.label(slot), slot.component, self.options):
                    self._entry(number, adapter, slot, entry)
        order = self.base.source.infos
        return tuple(self._job(name, self.found[name]) for name in order if name in self.found)

    def _job(self, name: str, contributions: Sequence[Contribution]) -> Job:
        dtype = self.base.source.infos[name].dtype
        if dtype not in FLOATS:
            raise NotRepresentable(
                f"stored as {dtype}; adding to quantised weights is not supported yet",
                hint="use an fp16, bf16 or fp32 checkpoint",
                file=self.base.source.path,
                tensor=name,
            )
        return Job(name, stored_dtype(self.options.dtype, dtype), tuple(contributions))

    def _entry(self, number: int, adapter: Adapter, slot: Slot, entry: Entry) -> None:
        label = adapter.label(slot)
        pieces = self.base.locate(slot, self.held.get(slot.target, {}))
        if pieces is None:
            reason = f"the checkpoint has no {label}"
            self.unused[number].extend(Unused(key, reason) for key in entry.keys.values())
            return
        self._check_shape(adapter, label, entry, pieces)
        for piece, cut in _cuts(self.base, pieces):
            self.found.setdefault(piece.name, []).append(Contribution(number, entry, piece.rows, cut, label))

    def _check_shape(self, adapter: Adapter, label: str, entry: Entry, pieces: tuple[Piece, ...]) -> None:
        shape = self.base.slot_shape(pieces)
        rows, columns = shape[0] if shape else 1, 1
        for n in shape[1:]:
            columns *= n
        known = entry.facts.rows or rows, entry.facts.columns or columns  # some kinds do not tell both
        if known != (rows, columns):
            raise ShapeMismatch(
                f"{label} is {rows} × {columns} in the checkpoint, {known[0]} × {known[1]} in the adapter",
                hint="the adapter was made for another model of this family, or another family",
                file=adapter.source.path,
            )


def _cuts(base: Checkpoint, pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Each piece with the rows of the entry that fall on it (None: all of them)."""
    if len(pieces) == 1:
        yield pieces[0], None
        return
    start = 0
    for piece in pieces:
        rows = base.shape(piece.name)[0]
        yield piece, (start, start + rows)
        start += rows


def _spec_bytes(spec: TensorSpec) -> int:
    from adaptkit.files.header import itemsize

    count = 1
    for n in spec.shape:
        count *= n
    return int(count * itemsize(spec.dtype))


def _step(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> Step[Job]:
    info = base.source.infos[job.name]
    infos = [
        (c.adapter, role, adapters[c.adapter].source.infos[key])
        for c in job.contributions
        for role, key in c.entry.tensors()
    ]
    # W stored, W in float32, the merged tensor; a kind without factors needs its dense ΔW beside them
    dense = max(0 if c.entry.facts.rank and c.entry.kind.name == "lora" else 4 * info.numel for c in job.contributions)
    size = info.nbytes + 4 * info.numel + info.nbytes + dense + 3 * sum(i.nbytes for _, _, i in infos)
    contents = tuple((c.entry.kind.name, c.rows, c.cut, c.entry.facts.scale, c.adapter) for c in job.contributions)
    shape = (
        info.shape,
        info.dtype,
        job.dtype,
        base.places[job.name].transposed,
        contents,
        tuple((a, role, i.shape, i.dtype) for a, role, i in infos),
    )
    return Step(job, shape, size, base.source.order(job.name))


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Merge and write; the only part that reads weights."""
    from adaptkit.files.sink import TensorSink

    started = time.perf_counter()
    found: dict[str, _Merged] = {}
    total = len(plan.steps)
    merger = _Merger(plan)
    with TensorSink(plan.output, plan.specs, _metadata(plan), overwrite=plan.options.overwrite) as sink:

        def store(job: Job, result: _Merged) -> None:
            sink.put(job.name, result.tensor)
            found[job.name] = replace(result, tensor=None)  # type: ignore[arg-type]

        _copy_untouched(plan, sink)
        engine.run(
            plan.steps,
            engine.Work(merger.load, merger.merge, store),
            engine.Resources.choose(plan.options.device, plan.options.memory),
            None if progress is None else lambda done: progress(done, total),
        )
        plan.close()
        sink.commit()
    return _report(plan, found, time.perf_counter() - started)


def _copy_untouched(plan: Plan, sink: TensorSink) -> None:
    touched = {job.name for job in plan.jobs}
    sink.copy_many([(name, plan.base.source, name) for name in plan.base.source.infos if name not in touched])


class _Merger:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def load(self, job: Job) -> dict[str, Tensor]:
        read = self.plan.base.source.read
        loaded = {"base": read(job.name)}
        for n, c in enumerate(job.contributions):
            stored = self.plan.adapters[c.adapter].read(c.entry)
            loaded |= {f"{n}/{role}": tensor for role, tensor in stored.items()}
        return loaded

    def merge(self, jobs: Sequence[Job], tensors: dict[str, Tensor]) -> list[_Merged]:
        """All adapters of a tensor are applied in float32 (float64 for such a base), then rounded once."""
        import torch

        stored = tensors.pop("base")
        wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32, copy=True)
        matrix = wide.reshape(*wide.shape[:2], -1) if wide.ndim > 1 else wide.reshape(-1, 1, 1)
        place = self.plan.base.places[jobs[0].name]
        view = matrix.transpose(-1, -2) if place.transposed else matrix
        view = exchanged(matrix, -2) if place.swapped else view
        for n, c in enumerate(jobs[0].contributions):
            self._apply(view, n, c, tensors)
        if place.swapped:
            matrix.copy_(exchanged(view, -2))
        # a batch is of equal shapes and contributions; each member is finished on its own
        return [self._finished(job, wide[n], stored[n]) for n, job in enumerate(jobs)]

    def _apply(self, view: Tensor, n: int, c: Contribution, tensors: Mapping[str, Tensor]) -> None:
        roles = {role: tensors[f"{n}/{role}"] for role, _ in c.entry.tensors()}
        weights = c.entry.decode(roles)
        if c.cut is not None:
            weights = weights.part(*c.cut)
        rows = view if c.rows is None else view[..., slice(*c.rows), :]
        applied = weights.apply(rows, self.plan.strengths[c.adapter])
        if applied is not rows:
            rows.copy_(applied)

    def _finished(self, job: Job, merged: Tensor, stored: Tensor) -> _Merged:
        rounded = merged.to(torch_dtype(job.dtype))
        weight, delta, rounding = 0.0, 0.0, 0.0
        for old, new, out in _chunks(stored, merged, rounded):
            weight += _square(old)
            delta += _square(new - old)
            rounding += _square(out.to(new.dtype) - new)
        if not math.isfinite(delta):
            raise self._non_finite(job, stored)
        if not math.isfinite(rounding):
            largest = float(merged.abs().max())
            raise NonFinite(
                f"the merged weight, {largest:.4g} at most, does not fit {str(rounded.dtype).removeprefix('torch.')}",
                hint="lower the strength, or write with --dtype bf16 or fp32",
                file=self.plan.output,
                tensor=job.name,
            )
        return _Merged(rounded.cpu(), weight, delta, rounding)

    def _non_finite(self, job: Job, stored: Tensor) -> NonFinite:
        import torch

        if not bool(torch.isfinite(stored).all()):
            return NonFinite("holds NaN or infinity", file=self.plan.base.source.path, tensor=job.name)
        for c in job.contributions:
            adapter = self.plan.adapters[c.adapter]
            for _, key in c.entry.tensors():
                if not bool(torch.isfinite(adapter.source.read(key)).all()):
                    return NonFinite("holds NaN or infinity", file=adapter.source.path, tensor=key)
        return NonFinite("the merged weight overflows", file=self.plan.output, tensor=job.name)


def _square(x: Tensor) -> float:
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(x.unsqueeze(0)))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), ROW_CHUNK):
        first, *rest = (t[start : start + ROW_CHUNK] for t in flat)
        yield first.to(rest[0].dtype), *rest


def _report(plan: Plan, found: Mapping[str, _Merged], seconds: float) -> Report:
    delta = sum(result.delta for result in found.values())
    rounding = sum(result.rounding for result in found.values())
    weight = sum(result.weight for result in found.values())
    details = []
    for job in plan.jobs:
        result = found[job.name]
        for c in job.contributions:
            details.append(
                {
                    "module": c.label,
                    "tensor": job.name,
                    "algorithm": c.entry.kind.name,
                    "rank": c.entry.facts.rank,
                    "relative_error": (result.rounding / result.delta) ** 0.5 if result.delta else 0.0,
                    "relative_change": (result.delta / result.weight) ** 0.5 if result.weight else None,
                }
            )
    return Report(
        output=plan.output,
        bytes=plan.output.stat().st_size,
        modules=sum(len(job.contributions) for job in plan.jobs),
        parameters=sum(_count(spec) for spec in plan.specs),
        relative_error=(rounding / delta) ** 0.5 if delta else 0.0,
        unused=plan.unused,
        seconds=seconds,
        details=tuple(details),
        family=plan.base.family.name,
        adapters=tuple(plan.described()),
        tensors=len(plan.specs),
        changed=sum(1 for result in found.values() if result.delta > 0),
        relative_change=(delta / weight) ** 0.5 if weight else 0.0,
    )


def _count(spec: TensorSpec) -> int:
    count = 1
    for n in spec.shape:
        count *= n
    return count


def _metadata(plan: Plan) -> dict[str, str]:
    from adaptkit.files.provenance import updated

    record = {
        "adaptkit": __version__,
        "command": "merge",
        "base": plan.base.source.path.name,
        "adapters": [
            {"name": a.source.path.name, "strength": s} for a, s in zip(plan.adapters, plan.strengths, strict=True)
        ],
    }
    return updated(plan.base.source.metadata, record)
