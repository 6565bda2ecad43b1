"""merge: bake adapters into a checkpoint, streaming; what no adapter touches is copied as bytes."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.adapter import Adapter, Entry
from adaptkit.checkpoint import Checkpoint, Piece
from adaptkit.engine import check_memory
from adaptkit.errors import NothingToDo, NotRepresentable, ShapeMismatch
from adaptkit.files.header import TensorSpec
from adaptkit.ops.merge.kernel import Blender, Merged, Task, combined, step_of
from adaptkit.ops.merge.block_weights import Blocks
from adaptkit.ops.shared import (
    Progress,
    Unused,
    WriterReport,
    check_output,
    default_output,
    refuse_unused,
    selected,
    stored_dtype,
)
from adaptkit.ops.merge.layout import as_single, opened, plan_layout
from adaptkit.ops.merge.provenance import Provenance
from adaptkit.ops.merge.plan import Contribution, Job, Options, Plan
from adaptkit.ops.merge.relayout import Relayout, wanted
from adaptkit.ops.inspect.stats import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from adaptkit.names import Slot
    from adaptkit.ops.merge.layout import Layout, Output
    from adaptkit.ops.merge.verify import Verified

__all__ = ["Options", "Plan", "Report", "plan", "run"]


@dataclass(frozen=True, kw_only=True)
class Report(WriterReport):
    """What was merged: `changed` tensors that differ from the base, and ‖ΔW‖/‖W‖ over the touched ones.

    `blocks`: the same for each block; `block_weights`: what each rule of `--blocks` got; `left_out`: files of the base's
    folder that are not in the output, because they hold the weights that were merged into once more.
    """

    family: str
    adapters: tuple[Mapping[str, Any], ...]
    tensors: int
    changed: int
    relative_change: float
    blocks: tuple[Mapping[str, Any], ...] = ()
    block_weights: tuple[Mapping[str, Any], ...] = ()
    verified: Verified | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    quantised: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "adapters": [dict(item) for item in self.adapters],
            "tensors": self.tensors,
            "tensors_changed": self.changed,
            "relative_change": self.relative_change,
            "blocks": [dict(item) for item in self.blocks],
            "block_weights": [dict(item) for item in self.block_weights],
            "verified": None if self.verified is None else self.verified.to_dict(),
            "files": list(self.files),
            "left_out": list(self.left_out),
            "quantised": self.quantised,
            "notes": list(self.notes),
        }
        return {**super().to_dict(), **extra}


ONLY_WEIGHTS = "the folder holds weights only: its config.json files are those of any diffusers folder of this model"
UNCHANGED = Merged(None, None, 0.0, 0.0, 0.0)


def plan(base: Path, adapters: Sequence[tuple[Path, float]], options: Options) -> Plan:
    """Find the place of every adapter module in the base; reads headers only, and fails here if anything can."""
    with ExitStack() as failing:
        checkpoint = failing.enter_context(
            Checkpoint.open(base, family=options.family, strangers=True)
        )
        opened = []
        for path, _ in adapters:
            opened.append(_open_adapter(checkpoint, path, options))
            failing.callback(opened[-1].close)
        made = _planned(
            base, checkpoint, tuple(opened), tuple(strength for _, strength in adapters), options
        )
        failing.pop_all()
        return made


def _planned(
    path: Path,
    base: Checkpoint,
    adapters: tuple[Adapter, ...],
    strengths: tuple[float, ...],
    options: Options,
) -> Plan:
    single = as_single(base.source, options.output, options.shard_size, options.layout)
    renamed = wanted(base, options.layout)
    output = options.output or default_output(path, "merged", folder=not single)
    if single:
        check_output(output, options.overwrite)
    places = _Places(base, adapters, strengths, options)
    jobs = places.jobs()
    for adapter, lost in zip(adapters, places.unused, strict=True):
        refuse_unused(lost, options.allow_unused, adapter.source.path)
    if not jobs:
        raise NothingToDo(
            "no module of these adapters applies to this checkpoint",
            hint="see --only and --skip",
            file=path,
        )
    places.blocks.check()
    working = _working(base, jobs, options)
    specs = tuple(_specs(base, {job.name: job for job in working}, options))
    if renamed:
        made = _relayout(base, specs, options)
        specs, layout = (
            tuple(spec for spec in specs if spec.name in made.moves),
            made.layout(options.shard_size),
        )
        places.unused.append(made.lost)
    else:
        touched = {name for job in working for name in job.writes()}
        layout = plan_layout(base.source, specs, touched, single, options.shard_size)
    if layout.folder:
        _check_folder(output, layout, options)
    steps = tuple(step_of(job, base, adapters) for job in working)
    check_memory(steps, options.memory)
    unused = tuple(item for items in places.unused for item in items)
    rules = tuple(places.blocks.records())
    return Plan(
        base, adapters, strengths, options, output, jobs, specs, unused, steps, layout, rules
    )


def _relayout(base: Checkpoint, specs: Sequence[TensorSpec], options: Options) -> Relayout:
    """Where everything goes in the other layout; what has no place there fails the run unless it is allowed."""
    assert options.layout is not None
    scaled = [spec.name for spec in specs if spec.name in base.quantization.extras]
    if scaled:
        raise NotRepresentable(
            f"--layout {options.layout}: scaled weights have no other layout",
            hint="pass --dtype bf16 as well",
            file=base.source.path,
            tensor=scaled[0],
        )
    made = Relayout(base, specs, options.layout)
    refuse_unused(made.refused, options.allow_unused, base.source.path)
    return made


def _check_folder(output: Path, layout: Layout, options: Options) -> None:
    from adaptkit.files.sink import check_folder

    check_folder(output, layout.top, options.overwrite)


def _working(base: Checkpoint, jobs: Sequence[Job], options: Options) -> tuple[Job, ...]:
    """The jobs that make another tensor than the base has, in its order: those of other tensors only change the dtype."""
    placed = {job.name: job for job in jobs}
    if options.dtype != "keep" and base.quantization.refused:
        name, scheme = next(iter(base.quantization.refused.items()))
        raise NotRepresentable(
            f"stored as {scheme}, which cannot be converted",
            hint="leave --dtype away",
            file=base.source.path,
            tensor=name,
        )
    found = []
    for info in base.source.infos.values():
        job = placed.get(info.name)
        if job is not None and job.changes:
            found.append(job)
        elif options.dtype != "keep" and info.name not in base.quantization.extras:
            dtype = _new_dtype(base, info.name, options)
            if dtype != info.dtype or info.name in base.quantization.scales:
                found.append(Job(info.name, dtype, ()))
    return tuple(found)


def _new_dtype(base: Checkpoint, name: str, options: Options) -> str:
    """The dtype a tensor gets: numbers are converted when asked for, indices and what cannot be read stay."""
    info = base.source.infos[name]
    return (
        info.dtype if base.quantization.refusal(info) else stored_dtype(options.dtype, info.dtype)
    )


def _specs(base: Checkpoint, working: Mapping[str, Job], options: Options) -> Iterator[TensorSpec]:
    """All tensors of the output in the base's order; those that describe scaled weights go when nothing is scaled any more."""
    stored = base.quantization
    dropped = stored.extras if options.dtype != "keep" else frozenset[str]()
    for info in base.source.infos.values():
        if info.name not in dropped:
            yield TensorSpec(
                info.name,
                working[info.name].dtype if info.name in working else info.dtype,
                info.shape,
            )


def _open_adapter(base: Checkpoint, path: Path, options: Options) -> Adapter:
    if not base.known:
        return Adapter.open_as(path, base.family, format=options.format)
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

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        strengths: Sequence[float],
        options: Options,
    ) -> None:
        self.base, self.adapters, self.strengths, self.options = base, adapters, strengths, options
        self.blocks = Blocks(options.blocks, base.family)
        self.held = base.targets()
        self.unused: list[list[Unused]] = [
            [Unused(key, reason) for key, reason in adapter.unclaimed.items()]
            for adapter in adapters
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
        info, stored = self.base.source.infos[name], self.base.quantization
        if (reason := stored.refusal(info)) is not None:
            raise NotRepresentable(
                f"stored as {reason}: an adapter cannot be added to that",
                hint="use an fp32, fp16, bf16 or fp8 (e4m3, e5m2) checkpoint of this model",
                file=self.base.source.path,
                tensor=name,
            )
        dtype = stored_dtype(self.options.dtype, info.dtype)
        scale = stored.scales.get(name) if self.options.dtype == "keep" else None
        return Job(name, dtype, tuple(contributions), scale)

    def _entry(self, number: int, adapter: Adapter, slot: Slot, entry: Entry) -> None:
        label = adapter.label(slot)
        pieces = self.base.locate(slot, self.held.get(slot.target, {}))
        if pieces is None:
            reason = f"the checkpoint has no {label}"
            self.unused[number].extend(Unused(key, reason) for key in entry.keys.values())
            return
        self._check_shape(adapter, label, entry, pieces)
        strength = self.strengths[number] * self.blocks.weight(slot)
        for piece, cut in _cuts(self.base, pieces):
            self.found.setdefault(piece.name, []).append(
                Contribution(number, entry, piece.rows, cut, label, strength)
            )

    def _check_shape(
        self, adapter: Adapter, label: str, entry: Entry, pieces: tuple[Piece, ...]
    ) -> None:
        shape = self.base.slot_shape(pieces)
        rows, columns = shape[0] if shape else 1, 1
        for n in shape[1:]:
            columns *= n
        known = (
            entry.facts.rows or rows,
            entry.facts.columns or columns,
        )  # some kinds do not tell both
        if known != (rows, columns):
            raise ShapeMismatch(
                f"{label} is {rows} × {columns} in the checkpoint, {known[0]} × {known[1]} in the adapter",
                hint="the adapter was made for another model of this family, or another family",
                file=adapter.source.path,
            )


def _cuts(
    base: Checkpoint, pieces: tuple[Piece, ...]
) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Each piece with the rows of the entry that fall on it (None: all of them)."""
    if len(pieces) == 1:
        yield pieces[0], None
        return
    start = 0
    for piece in pieces:
        rows = base.shape(piece.name)[0]
        yield piece, (start, start + rows)
        start += rows


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Merge and write; the only part that reads weights."""
    return run_together([plan], progress)[0]


def run_together(plans: Sequence[Plan], progress: Progress | None = None) -> list[Report]:
    """Several merges into one base, which is read once for as many outputs as fit in memory; each is as `run` makes it.

    The seconds of a report are its share. An error of one ends all, and none of those under way appears.
    """
    return [report for group in _groups(plans) for report in _run(group, progress)]


def _groups(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """As many at once as the largest tensor of the base leaves room for."""
    held: list[Plan] = []
    for plan in plans:
        more = [*held, plan]
        room = engine.bound(plan.steps, plan.options.memory)
        if held and max(step.bytes for step in combined(more)) > room:
            yield held
            more = [plan]
        held = more
    yield held


def _run(plans: Sequence[Plan], progress: Progress | None) -> list[Report]:
    started = time.perf_counter()
    options = plans[0].options
    found: list[dict[str, Merged]] = [{} for _ in plans]
    steps = combined(plans)
    with ExitStack() as last, ExitStack() as stack:
        hashes: dict[Path, str] = {}
        outputs = [stack.enter_context(_output(plan, hashes)) for plan in plans]
        blender = Blender(plans, outputs)
        copying = _Background(lambda: _copy_untouched(plans, outputs))
        last.callback(copying.join)  # after the outputs are given up, which ends it

        def store(task: Task, results: Sequence[Merged | None]) -> None:
            for job, result, output, records in zip(
                task.jobs, results, outputs, found, strict=True
            ):
                if job is not None and result is not None:
                    if result.tensor is not None:
                        output.put(job.name, result.tensor)
                    if job.scale is not None and result.scale is not None:
                        output.put(job.scale, result.scale)
                    records[job.name] = replace(result, tensor=None, scale=None)

        resources = engine.Resources.choose(options.device, options.memory)
        told = None if progress is None else lambda done: progress(done, len(steps))
        engine.run(
            steps, engine.Work(blender.load, blender.blend, store, held=_held), resources, told
        )
        copying.wait()
        for plan in plans:
            if not plan.options.verify:
                plan.close()  # on Windows a file that is open cannot be replaced
        with ThreadPoolExecutor(
            len(plans)
        ) as disk:  # each waits for the disk, which takes them all at once
            verified = list(disk.map(_finished, plans, outputs))
    seconds = (time.perf_counter() - started) / len(plans)
    return [_report(*each, seconds) for each in zip(plans, found, verified, strict=True)]


def _output(plan: Plan, hashes: dict[Path, str]) -> AbstractContextManager[Output]:
    records = Provenance(plan, hashes)
    options = plan.options
    return opened(
        plan.layout,
        plan.output,
        records.metadata,
        overwrite=options.overwrite,
        hidden=options.verify,
    )


def _finished(plan: Plan, output: Output) -> Verified | None:
    from adaptkit.ops.merge.verify import verify

    output.finish()
    if not plan.options.verify:
        return None
    found = verify(plan, output.at)
    plan.close()
    return found


def _held(results: Sequence[Merged | None]) -> int:
    return sum(
        result.tensor.nbytes
        for result in results
        if result is not None and result.tensor is not None
    )


class _Background:
    """Work on a thread of its own: copying is the system's, and torch is imported meanwhile."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._failure = work, []  # type: tuple[Callable[[], None], list[BaseException]]
        self._thread = threading.Thread(target=self._body, name="adaptkit-copy", daemon=True)
        self._thread.start()

    def _body(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure.append(error)

    def join(self) -> None:
        """Wait for its end, whichever it takes."""
        self._thread.join()

    def wait(self) -> None:
        """Wait for it; its error is raised here."""
        self.join()
        if self._failure:
            raise self._failure[0]


def _copy_untouched(plans: Sequence[Plan], outputs: Sequence[Output]) -> None:
    for plan, output in zip(plans, outputs, strict=True):
        made = {name for job in plan.working for name in job.writes()}
        output.copy(plan.base.source, [spec.name for spec in plan.specs if spec.name not in made])


def _report(
    plan: Plan, found: Mapping[str, Merged], verified: Verified | None, seconds: float
) -> Report:
    results = {job.name: found.get(job.name, UNCHANGED) for job in plan.jobs}
    delta = sum(result.delta for result in results.values())
    # what a change of dtype does to the layers without an adapter is no loss of theirs
    rounding = sum(result.rounding for result in results.values())
    weight = sum(result.weight for result in results.values())
    written = (
        (plan.output / path for path in plan.layout.files())
        if plan.layout.folder
        else [plan.output]
    )
    return Report(
        output=plan.output,
        bytes=sum(path.stat().st_size for path in written),
        modules=sum(len(job.contributions) for job in plan.jobs),
        parameters=sum(math.prod(spec.shape) for spec in plan.specs),
        relative_error=_ratio(rounding, delta) or 0.0,
        unused=plan.unused,
        seconds=seconds,
        details=tuple(
            _detail(job, c, results[job.name]) for job in plan.jobs for c in job.contributions
        ),
        family=plan.base.family.name,
        adapters=tuple(plan.described()),
        tensors=len(plan.specs),
        changed=sum(1 for result in results.values() if result.delta > 0),
        relative_change=_ratio(delta, weight) or 0.0,
        blocks=tuple(_by_block(plan, results)),
        block_weights=plan.rules,
        verified=verified,
        files=tuple(plan.layout.files()),
        left_out=plan.layout.left_out,
        notes=(ONLY_WEIGHTS,) if plan.layout.folder and plan.layout.moves else (),
        quantised=sum(job.changes and job.dtype.startswith("F8") for job in plan.jobs),
    )


def _ratio(part: float, whole: float) -> float | None:
    """√(part / whole) of sums of squares; None where there is nothing to compare with."""
    return (part / whole) ** 0.5 if whole else None


def _detail(job: Job, c: Contribution, result: Merged) -> dict[str, Any]:
    return {
        "module": c.label,
        "tensor": job.name,
        "algorithm": c.entry.kind.name,
        "rank": c.entry.facts.rank,
        "strength": c.strength,
        "relative_error": _ratio(result.rounding, result.delta) or 0.0,
        "relative_change": _ratio(result.delta, result.weight),
    }


def _by_block(plan: Plan, results: Mapping[str, Merged]) -> Iterator[dict[str, Any]]:
    """Tensors changed and ‖ΔW‖/‖W‖ of each block, in the base's order."""
    blocks: dict[str, list[Job]] = {}
    for job in plan.jobs:
        c = job.contributions[0]
        blocks.setdefault(block_of(c.label, c.entry.slot.component), []).append(job)
    for block, jobs in blocks.items():
        found = [results[job.name] for job in jobs]
        yield {
            "block": block,
            "tensors": len(jobs),
            "tensors_changed": sum(result.delta > 0 for result in found),
            "relative_change": _ratio(sum(r.delta for r in found), sum(r.weight for r in found)),
        }
