"""convert: the same adapter in another key format or for another host; every key accounted for, bit for bit where it can be."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.adapter import Adapter, Entry
from adaptkit.algorithms._weights import ALPHA, Stated
from adaptkit.detect import chosen, formats
from adaptkit.engine import Step, check_memory, peak_memory
from adaptkit.errors import AmbiguousAdapter, NonFinite, NothingToDo, NotRepresentable
from adaptkit.files.header import TensorSpec
from adaptkit.formats._format import Alpha
from adaptkit.keymap import KeyMap, algorithms, compile_keys
from adaptkit.ops._common import (
    FLOATS,
    Progress,
    Shared,
    Unused,
    WriterReport,
    default_output,
    refuse_unused,
    selected,
    stored_dtype,
    torch_dtype,
)
from adaptkit.ops._peft import Module, adapter_file, check_adapter_output, diffusers_metadata, factor_rows, peft_config
from adaptkit.ops._respell import Job, Respelling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms._weights import Weights
    from adaptkit.files.sink import Spool, TensorSink

__all__ = ["Options", "Plan", "Report", "plan", "run"]

SPOOL = 256_000_000  # bytes of computed tensors held in memory before they go to a temporary file
SANE = 1e4  # an alpha above this, where it multiplies nothing, is a placeholder (ai-toolkit writes 9999999999)


@dataclass(frozen=True)
class Options(Shared):
    """What to write: a format (`to`) or what a host loads (`host`), perhaps in another algorithm (exact changes only)."""

    to: str | None = None
    host: str | None = None
    algo: str | None = None


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor taken over byte for byte, perhaps under another shape of as many elements."""

    key: str
    source: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Written:
    """An alpha that the source does not store."""

    key: str
    value: float


@dataclass(frozen=True)
class Task:
    """One slot of the output: `ready` tensors, or (None) what has to be computed, and why."""

    job: Job
    kind: type[Weights]
    ready: tuple[Copied | Written, ...] | None
    changes: frozenset[str] = frozenset()  # renamed | split | fused | swapped | folded | changed | cast


@dataclass(frozen=True)
class Plan:
    """Everything known before a weight is read."""

    adapter: Adapter
    keys: KeyMap
    options: Options
    output: Path
    tasks: tuple[Task, ...]
    carried: tuple[Copied, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[Task], ...]
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many slots are merely renamed, split, fused, folded, …"""
        found = Counter(change for task in self.tasks for change in (task.changes or {"renamed"}))
        return {name: found[name] for name in CHANGES if found[name]}

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints; `bytes_out` leaves out what has to be computed first."""
        infos = self.adapter.source.infos
        ready = [item for task in self.tasks for item in task.ready or () if isinstance(item, Copied)]
        return {
            "output": str(self.output),
            "family": self.adapter.family.name,
            "from": self.adapter.format.name,
            "to": self.keys.format.name,
            "modules": len(self.tasks),
            **self.counts(),
            "bytes_in": self.adapter.source.size,
            "bytes_out_copied": sum(infos[item.source].nbytes for item in (*ready, *self.carried)),
            "peak_memory": peak_memory(self.steps),
            "notes": list(self.notes),
            "unused": [item.to_dict() for item in self.unused],
            "details": [_detail(task, 0.0, None) for task in self.tasks],
        }

    def close(self) -> None:
        """Close the input."""
        self.adapter.close()


CHANGES = ("renamed", "split", "fused", "swapped", "folded", "changed", "cast")


@dataclass(frozen=True, kw_only=True)
class Report(WriterReport):
    """What was written. `changes` counts the slots by what was done to them."""

    family: str
    source_format: str
    format: str
    changes: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "from": self.source_format,
            "to": self.format,
            "changes": dict(self.changes),
            "notes": list(self.notes),
        }
        return {**super().to_dict(), **extra}


@dataclass
class _Result:
    """A computed slot: its keys in the spool, rank, and the ‖·‖² of ΔW and of what rounding did to it."""

    keys: tuple[str, ...]
    rank: int | None
    alpha: float
    parameters: int
    norm: float
    error: float
    tensors: dict[str, Tensor] = field(default_factory=dict)


# planning ----------------------------------------------------------------------------------------------------------


def plan(path: Path, options: Options) -> Plan:
    """Find the place of every module in the new format; reads headers only, and fails here if anything can."""
    stored_dtype(options.dtype, "F32")
    if options.algo is not None:
        chosen("algorithm", algorithms(), options.algo)
    adapter = Adapter.open(path, family=options.family, format=options.format)
    target, notes = _target(adapter, options)
    output = options.output or default_output(path, target.format, folder=target.config)
    check_adapter_output(output, folder=target.config, overwrite=options.overwrite)
    keys = _keys(adapter, target.format)
    planner = _Planner(adapter, keys, target, options)
    tasks = planner.tasks()
    refuse_unused(planner.unused, options.allow_unused, path)
    if not tasks:
        raise NothingToDo("no module of this adapter is left to convert", hint="see --only and --skip", file=path)
    _check_family(adapter, target.format, tasks, options)
    carried = tuple(Copied(name, name, _spec(adapter, name)) for name in adapter.carried)
    steps = tuple(_step(task, adapter) for task in tasks if task.ready is None)
    check_memory(steps, options.memory)
    made = Plan(adapter, keys, options, output, tasks, carried, tuple(planner.unused), steps, notes)
    if target.config:
        peft_config(_modules(made, {}))  # says what PEFT cannot hold before anything is computed
    return made


@dataclass(frozen=True, slots=True)
class _Target:
    """The format to write, and whether alpha has to go into the weights whatever the format says."""

    format: str
    fold: bool

    @property
    def config(self) -> bool:
        return formats()[self.format].alpha is Alpha.CONFIG


def _target(adapter: Adapter, options: Options) -> tuple[_Target, tuple[str, ...]]:
    if options.to is not None:
        chosen("format", formats(), options.to)
        return _Target(options.to, formats()[options.to].alpha is Alpha.NONE), ()
    if options.host is None:
        return _Target(adapter.format.name, adapter.format.alpha is Alpha.NONE), ()
    from adaptkit.hosts import recipe

    found = recipe(options.host, adapter, options.algo)
    return _Target(found.format, found.fold_alpha or formats()[found.format].alpha is Alpha.NONE), found.warnings


def _keys(adapter: Adapter, format: str) -> KeyMap:
    return compile_keys(adapter.family.name, format) if adapter.known else KeyMap(adapter.family, formats()[format])


def _check_family(adapter: Adapter, format: str, tasks: Sequence[Task], options: Options) -> None:
    """AmbiguousAdapter where a look-alike family would give other names."""
    if options.family is not None:
        return
    ours = [_stem(_keys(adapter, format), task) for task in tasks]
    for name in adapter.detection.alternatives:
        other = Adapter.understand(adapter.source, None, family=name, format=adapter.format.name)
        respelled = Respelling(other, compile_keys(name, format))
        theirs = [respelled.keys.stem(job.slot) for job in respelled.jobs(other.entries)]
        if theirs != ours:
            raise AmbiguousAdapter(
                f"this may be {adapter.family.title} or {other.family.title}, and the names to write differ",
                hint=f"say which: --family {adapter.family.name} or --family {name}",
                file=adapter.source.path,
            )


def _stem(keys: KeyMap, task: Task) -> str:
    return keys.stem(task.job.slot)


def _spec(adapter: Adapter, name: str) -> TensorSpec:
    info = adapter.source.infos[name]
    return TensorSpec(name, info.dtype, info.shape)


def _step(task: Task, adapter: Adapter) -> Step[Task]:
    """Working memory of a slot: what is read, and what is computed from it in float32 and rounded."""
    infos = adapter.source.infos
    names = [key for entry in task.job.entries for _, key in entry.tensors()]
    elements = sum(infos[name].numel for name in names)
    if "changed" in task.changes or task.kind.name == "full":
        facts = task.job.entries[0].facts
        elements += facts.rows * facts.columns
    fused = len(task.job.parts) if "fused" in task.changes else 1
    return Step(task, id(task), 16 * elements * fused, adapter.source.order(names[0]))


class _Planner:
    """Makes a task of every job; what would be lost goes to `unused`."""

    def __init__(self, adapter: Adapter, keys: KeyMap, target: _Target, options: Options) -> None:
        self.adapter, self.keys, self.target, self.options = adapter, keys, target, options
        self.unused: list[Unused] = [Unused(key, _why(adapter, key, why)) for key, why in adapter.unclaimed.items()]

    def tasks(self) -> tuple[Task, ...]:
        entries = self.adapter.entries
        if self.options.only or self.options.skip:
            label = self.adapter.label
            entries = {s: e for s, e in entries.items() if selected(label(s), s.component, self.options)}
        respelling = Respelling(self.adapter, self.keys)
        tasks = tuple(self._task(job) for job in respelling.jobs(entries))
        self.unused += [Unused(key, why) for key, why in respelling.lost.items()]
        return tasks

    def _task(self, job: Job) -> Task:
        kinds = {entry.kind for entry in job.entries}
        algo = self._algo(job)
        kind = next(iter(kinds)) if algo is None else algorithms()[algo]
        if len(kinds) > 1 and algo is None:
            names = " and ".join(sorted(kind.name for kind in kinds))
            raise NotRepresentable(
                f"its parts are {names}, which cannot be fused as they are",
                hint="convert with --algo lora or --algo full",
                tensor=job.label,
                file=self.adapter.source.path,
            )
        changes = frozenset(self._what(job))
        ready = self._ready(job, kind) if changes <= {"renamed"} else None
        return Task(job, kind, ready, changes)

    def _algo(self, job: Job) -> str | None:
        """The algorithm that `--algo` changes this slot to, if it does; vectors stay full differences."""
        algo = self.options.algo
        if any(entry.facts.vector for entry in job.entries) or all(e.kind.name == algo for e in job.entries):
            return None
        return algo

    def _what(self, job: Job) -> Iterator[str]:
        parts, entry = job.parts, job.whole
        if len(parts) > 1:
            yield "fused"
        elif entry is None:
            yield "split"
        if any(e.swapped for e in job.entries) != self.keys.swapped(job.slot):
            yield "swapped"
        if self._algo(job) is not None:
            yield "changed"
        if any(self._folds(e) for e in job.entries):
            yield "folded"
        if any(self._casts(key) for e in job.entries for _, key in e.tensors()):
            yield "cast"

    def _casts(self, key: str) -> bool:
        dtype = self.adapter.source.infos[key].dtype
        return dtype in FLOATS and stored_dtype(self.options.dtype, dtype) != dtype

    def _folds(self, entry: Entry) -> bool:
        """Whether the scale has to go into the weights: no place for alpha, or none that a reader takes as a scale."""
        if entry.facts.scale == 1.0 or entry.kind.bounded:
            return False
        return self.target.fold or (entry.facts.rank is None and ALPHA in entry.kind.roles)

    def _ready(self, job: Job, kind: type[Weights]) -> tuple[Copied | Written, ...]:
        entry = job.whole
        assert entry is not None
        spell = self.keys.spell
        found: list[Copied | Written] = []
        for role, key in entry.keys.items():
            if role != ALPHA:
                info = self.adapter.source.infos[key]
                shape = self._shape(entry, role, info.shape)
                name = spell(job.slot, kind.name, kind.stored_as(role, peft=self.keys.format.peft))
                found.append(Copied(name, key, TensorSpec(name, info.dtype, shape)))
        alpha = self._alpha(job, entry)
        return tuple(found) if alpha is None else (*found, alpha)

    def _shape(self, entry: Entry, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape in the new format: PEFT and LyCORIS lay DoRA's magnitudes out differently."""
        try:
            return entry.kind.laid_out(role, shape, entry.facts, peft=self.keys.format.peft)
        except NotRepresentable as error:
            raise error.at(file=self.adapter.source.path, tensor=entry.keys[role]) from None

    def _alpha(self, job: Job, entry: Entry) -> Copied | Written | None:
        """What the new format says of alpha: the stored tensor, one of our own, or nothing."""
        if ALPHA not in entry.kind.roles or self._silent(entry):
            return None
        name = self.keys.spell(job.slot, entry.kind.name, ALPHA)
        stored, rank = entry.keys.get(ALPHA), entry.facts.rank
        placeholder = rank is None and not entry.kind.bounded and not abs(entry.alpha or math.inf) <= SANE
        if stored is not None and not placeholder:
            return Copied(name, stored, replace(_spec(self.adapter, stored), name=name))
        return Written(name, 1.0 if rank is None else entry.facts.scale * rank)

    def _silent(self, entry: Entry) -> bool:
        """Whether the new format says nothing of this entry's alpha."""
        if entry.kind.bounded:  # alpha is no scale but a bound, and part of the weights
            return ALPHA not in entry.keys
        place = self.keys.format.alpha
        if self.target.fold or place in (Alpha.NONE, Alpha.CONFIG):
            return True
        return place is Alpha.OPTIONAL and entry.facts.scale == 1.0


def _why(adapter: Adapter, key: str, reason: str) -> str:
    """The reason, and the nearest name that the tables know."""
    from adaptkit.suggest import nearest

    near = nearest(adapter.keys, key) if reason.startswith("no such") else None
    return reason if near is None else f"{reason}; the nearest known name is {near}"


# running -----------------------------------------------------------------------------------------------------------


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Compute what has to be computed, copy the rest as bytes, and write; the only part that reads weights."""
    started = time.perf_counter()
    results: dict[int, _Result] = {}
    with _spool(plan) as spool:
        if plan.steps:
            _compute(plan, spool, results, progress)
        size = _write(plan, spool, results)
    return _report(plan, results, size, time.perf_counter() - started)


def _spool(plan: Plan) -> Any:
    from contextlib import nullcontext

    from adaptkit.files.sink import Spool

    return Spool(SPOOL, plan.output.parent) if plan.steps else nullcontext()


def _compute(plan: Plan, spool: Spool, results: dict[int, _Result], progress: Progress | None) -> None:
    worker = _Worker(plan)

    def store(task: Task, result: _Result) -> None:
        for key, tensor in result.tensors.items():
            spool.append(key, tensor)
        results[id(task)] = replace(result, keys=tuple(result.tensors), tensors={})

    total = len(plan.steps)
    engine.run(
        plan.steps,
        engine.Work(worker.load, worker.work, store),
        engine.Resources("cpu", plan.options.memory or engine.DEFAULT_MEMORY),  # bound by the disk, not by arithmetic
        None if progress is None else lambda done: progress(done, total),
    )


class _Worker:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def load(self, task: Task) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for n, entry in enumerate(task.job.entries):
            found |= {f"{n}/{role}": tensor for role, tensor in self.plan.adapter.read(entry).items()}
        return found

    def work(self, tasks: Sequence[Task], tensors: dict[str, Tensor]) -> list[_Result]:
        (task,) = tasks
        stored = {name: tensor[0] for name, tensor in tensors.items()}
        try:
            return [self._task(task, stored)]
        except (NotRepresentable, NonFinite) as error:
            raise error.at(file=self.plan.adapter.source.path, tensor=task.job.label) from None

    def _task(self, task: Task, stored: Mapping[str, Tensor]) -> _Result:
        exact = self._exact(task, stored)
        first = task.job.entries[0]
        if "changed" in task.changes:
            exact = task.kind.exactly(exact, first.facts.kernel)
        if self.plan.keys.swapped(task.job.slot):
            exact = exact.swapped()
        folded = exact.folded() if self._fold(task, exact) else exact
        dtype = torch_dtype(self._dtype(task))
        encoded = {role: self._rounded(role, tensor, dtype) for role, tensor in folded.encode().items()}
        shapes = {role: tuple(tensor.shape) for role, tensor in encoded.items() if role != ALPHA}
        alpha = None if ALPHA not in encoded else Stated(float(encoded[ALPHA]))
        facts = task.kind.facts(shapes, alpha)
        norm, error = _distance(exact, task.kind.decode({r: encoded[r] for r in shapes}, facts))
        parameters = sum(encoded[role].numel() for role in shapes)
        value = float(encoded[ALPHA]) if ALPHA in encoded else 0.0
        return _Result((), facts.rank, value, parameters, norm, error, self._named(task, encoded, facts.scale))

    def _exact(self, task: Task, stored: Mapping[str, Tensor]) -> Weights:
        """The parts in the target's order of rows, cut and put together, nothing rounded."""
        found: list[Weights] = []
        entries = iter(enumerate(task.job.entries))
        for part in task.job.parts:
            if part.entry is None:
                found.append(None)  # type: ignore[arg-type]
                continue
            n, entry = next(entries)
            weights = entry.decode({role: stored[f"{n}/{role}"] for role, _ in entry.tensors()})
            found.append(weights if part.cut is None else weights.part(*part.cut))
        like = next(weights for weights in found if weights is not None)
        if len(found) == 1:
            return like
        if len({type(weights) for weights in found if weights is not None}) > 1:
            found = [w if w is None else task.kind.exactly(w, task.job.entries[0].facts.kernel) for w in found]
            like = next(weights for weights in found if weights is not None)
        filled = [
            w if w is not None else like.zeros(like, part.rows) for w, part in zip(found, task.job.parts, strict=True)
        ]
        return type(like).fuse(filled)

    def _fold(self, task: Task, weights: Weights) -> bool:
        return "folded" in task.changes or (self.plan.keys.format.alpha is Alpha.NONE and not weights.bounded)

    def _dtype(self, task: Task) -> str:
        """The widest dtype among the parts, or the one asked for."""
        infos = self.plan.adapter.source.infos
        dtypes = {infos[key].dtype for entry in task.job.entries for _, key in entry.tensors()}
        kept = {dtype for dtype in dtypes if not dtype.startswith(("I", "U", "BOOL"))}
        if not kept <= set(FLOATS):
            raise NotRepresentable(
                f"stored as {', '.join(sorted(kept - set(FLOATS)))}; only plain floats can be computed with"
            )
        widest = min(kept, key=FLOATS.index) if len(kept) == 1 or "F32" in kept or "F64" in kept else "F32"
        return stored_dtype(self.plan.options.dtype, widest)

    def _rounded(self, role: str, tensor: Tensor, dtype: Any) -> Tensor:
        from adaptkit.linalg.precision import cast

        if role == ALPHA:
            return tensor.float()
        if not tensor.is_floating_point():  # a flag
            return tensor
        try:
            return cast(tensor, dtype)
        except NonFinite as error:
            error.hint = "write with --dtype bf16 or fp32"
            raise

    def _named(self, task: Task, encoded: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        keys, slot = self.plan.keys, task.job.slot
        found: dict[str, Tensor] = {}
        for role, tensor in encoded.items():
            if role == ALPHA and not task.kind.bounded:
                place = keys.format.alpha
                silent = "folded" in task.changes and place is not Alpha.TENSOR
                if silent or place in (Alpha.NONE, Alpha.CONFIG) or (place is Alpha.OPTIONAL and scale == 1.0):
                    continue
            stored = task.kind.stored_as(role, peft=keys.format.peft)
            found[keys.spell(slot, task.kind.name, stored)] = self._laid_out(task, role, tensor, encoded)
        return found

    def _laid_out(self, task: Task, role: str, tensor: Tensor, encoded: Mapping[str, Tensor]) -> Tensor:
        if role == ALPHA:
            return tensor.contiguous()
        shapes = {name: tuple(t.shape) for name, t in encoded.items() if name != ALPHA}
        facts = task.kind.facts(shapes)
        return tensor.reshape(
            task.kind.laid_out(role, shapes[role], facts, peft=self.plan.keys.format.peft)
        ).contiguous()


def _distance(exact: Weights, stored: Weights) -> tuple[float, float]:
    """‖ΔW‖² and the ‖·‖² of what was lost, in float64; through factors where both kinds have them."""
    import torch

    from adaptkit.linalg.lowrank import product_norm_squared

    if not exact.additive:
        return 0.0, 0.0
    try:
        (left, right), (other, theirs) = _wide(exact.factors()), _wide(stored.factors())
    except NotRepresentable:
        ours, delta = exact.delta().double(), stored.delta().double()
        return float(ours.square().sum()), float((ours - delta).square().sum())
    norm = exact.norm_squared()
    if right.shape == theirs.shape and torch.equal(right, theirs):
        return norm, float(product_norm_squared(left - other, right))
    return norm, float(product_norm_squared(torch.cat([left, -other], -1), torch.cat([right, theirs], -2)))


def _wide(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return factors[0].double(), factors[1].double()


# writing -----------------------------------------------------------------------------------------------------------


def _write(plan: Plan, spool: Spool | None, results: Mapping[int, _Result]) -> int:
    from adaptkit.files.sink import TensorSink

    specs = _specs(plan, spool, results)
    metadata = _metadata(plan, results)
    modules = _modules(plan, results) if plan.keys.format.alpha is Alpha.CONFIG else None
    with adapter_file(plan.output, modules, plan.options.overwrite) as (path, overwrite):
        return _write_file(plan, spool, TensorSink(path, specs, metadata, overwrite=overwrite), metadata)


def _write_file(plan: Plan, spool: Spool | None, sink: TensorSink, metadata: Mapping[str, str]) -> int:
    ready = [item for task in plan.tasks for item in task.ready or ()]
    copied = [item for item in (*ready, *plan.carried) if isinstance(item, Copied)]
    scalars = {item.key: _float32(item.value) for item in ready if isinstance(item, Written)}
    with sink:
        hashing = _Hashing(plan, spool, sink, metadata)
        sink.copy_many([(item.key, plan.adapter.source, item.source) for item in copied])
        for key, data in scalars.items():
            sink.put_bytes(key, memoryview(data))
        if spool is not None:
            spool.write_to(sink)
        if hashing.needed:
            sink.restate(hashing.result())
        # a conversion can be made again from its input, so nobody waits for the disk; unless it replaces that input
        sink.commit(sync=plan.output.exists())
    return sink.size


class _Hashing:
    """sd-scripts' hashes, where the file had them, of what it will hold; worked out while the tensors are copied."""

    def __init__(self, plan: Plan, spool: Spool | None, sink: TensorSink, metadata: Mapping[str, str]) -> None:
        from adaptkit.files.provenance import SSHS

        self.metadata = metadata
        self.needed = bool(SSHS.keys() & metadata.keys())
        self._found: dict[str, str] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(plan, spool, sink), daemon=True)
        if self.needed:
            self._thread.start()

    def _run(self, plan: Plan, spool: Spool | None, sink: TensorSink) -> None:
        from adaptkit.files.header import build_header
        from adaptkit.files.provenance import sshs_hashes

        try:
            training = {name: value for name, value in self.metadata.items() if name.startswith("ss_")}
            header, _ = build_header(sink.infos.values(), training)
            self._found = sshs_hashes(_data(plan, spool, list(sink.infos)), len(header))
        except BaseException as error:
            self._failure = error

    def result(self) -> dict[str, str]:
        """The metadata with the hashes in their places."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {name: self._found.get(name, value) for name, value in self.metadata.items()}


def _data(plan: Plan, spool: Spool | None, names: Sequence[str]) -> Iterator[memoryview]:
    """The bytes of every tensor of the output, in order."""
    ready = [item for task in plan.tasks for item in task.ready or ()]
    copied = {item.key: item.source for item in (*ready, *plan.carried) if isinstance(item, Copied)}
    scalars = {item.key: item.value for item in ready if isinstance(item, Written)}
    for name in names:
        if name in copied:
            yield plan.adapter.source.raw(copied[name])
        elif name in scalars:
            yield memoryview(_float32(scalars[name]))
        elif spool is not None:
            yield spool.read(name)


def _float32(value: float) -> bytes:
    import struct

    return struct.pack("<f", value)


def _specs(plan: Plan, spool: Spool | None, results: Mapping[int, _Result]) -> list[TensorSpec]:
    """In the order that the official library writes: wide dtypes first, then by name."""
    computed = {spec.name: spec for spec in spool.specs()} if spool is not None else {}
    found: list[TensorSpec] = [item.spec for item in plan.carried]
    for task in plan.tasks:
        if task.ready is None:
            found.extend(computed[key] for key in results[id(task)].keys)
        for item in task.ready or ():
            found.append(item.spec if isinstance(item, Copied) else TensorSpec(item.key, "F32", ()))
    twice = [name for name, n in Counter(spec.name for spec in found).items() if n > 1]
    if twice:
        raise NotRepresentable(f"two modules would both be written as {twice[0]}", file=plan.adapter.source.path)
    return sorted(found, key=lambda spec: (-_width(spec.dtype), spec.name))


def _width(dtype: str) -> int:
    from adaptkit.files.header import DTYPES

    return DTYPES[dtype]


def _modules(plan: Plan, results: Mapping[int, _Result]) -> list[Module]:
    """The modules as a PEFT configuration names them."""
    return [_module(plan, task, results.get(id(task))) for task in plan.tasks]


def _module(plan: Plan, task: Task, result: _Result | None) -> Module:
    entry = task.job.entries[0]
    facts = entry.facts
    rank = facts.rank if result is None else result.rank
    alpha = None if rank is None else (facts.scale * rank if result is None else result.alpha)
    name = plan.keys.module(task.job.slot)
    # two full LoKr factors have no rank; PEFT multiplies them by alpha / r all the same, so both are 1
    shapes = {role: plan.adapter.source.infos[key].shape for role, key in entry.tensors()}
    value = alpha if alpha is not None else 1.0
    return Module(name, task.kind.name, rank or 1, value, frozenset(shapes), factor_rows(shapes))


def _metadata(plan: Plan, results: Mapping[int, _Result]) -> dict[str, str]:
    from adaptkit.files.provenance import sshs_places, updated

    adapter = plan.adapter
    record = {
        "adaptkit": __version__,
        "command": "convert",
        "source": adapter.source.path.name,
        "from": adapter.format.name,
        "to": plan.keys.format.name,
        **plan.counts(),
    }
    kept = {name: value for name, value in adapter.metadata.items() if name != "lora_adapter_metadata"}
    changed = _ranks(plan, results) | _for_diffusers(plan, results)
    return updated(kept | changed, record) | sshs_places(adapter.metadata)


def _ranks(plan: Plan, results: Mapping[int, _Result]) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha` where the file has them and they no longer hold."""
    if "ss_network_dim" not in plan.adapter.metadata or plan.counts().keys() <= {"renamed", "split", "swapped", "cast"}:
        return {}
    modules = _modules(plan, results)
    dims, alphas = {m.rank for m in modules}, {m.alpha for m in modules}
    return {
        "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def _for_diffusers(plan: Plan, results: Mapping[int, _Result]) -> dict[str, str]:
    """diffusers before 0.42 takes the first module's rank for every alpha: where ranks differ it has to be told."""
    if plan.keys.format.name != "diffusers":
        return {}
    parts: dict[str, list[Module]] = {}
    for task in plan.tasks:
        if task.kind.name not in ("lora", "lora+dora"):
            return {}
        parts.setdefault(task.job.slot.component, []).append(_module(plan, task, results.get(id(task))))
    if all(len({m.rank for m in modules}) == 1 for modules in parts.values()):
        return {}
    return {"lora_adapter_metadata": diffusers_metadata(parts)}


def _report(plan: Plan, results: Mapping[int, _Result], size: int, seconds: float) -> Report:
    error = sum(result.error for result in results.values())
    norm = sum(result.norm for result in results.values()) + (_untouched(plan) if error else 0.0)
    infos = plan.adapter.source.infos
    ready = [item for task in plan.tasks for item in task.ready or () if isinstance(item, Copied)]
    scalars = sum(infos[item.source].numel for item in ready if not item.key.endswith(f".{ALPHA}"))
    return Report(
        output=plan.output,
        bytes=size,
        modules=len(plan.tasks),
        parameters=scalars + sum(result.parameters for result in results.values()),
        relative_error=(error / norm) ** 0.5 if error else 0.0,
        unused=plan.unused,
        seconds=seconds,
        details=tuple(_task_detail(task, results.get(id(task))) for task in plan.tasks),
        family=plan.adapter.family.name,
        source_format=plan.adapter.format.name,
        format=plan.keys.format.name,
        changes=plan.counts(),
        notes=plan.notes,
    )


def _untouched(plan: Plan) -> float:
    """‖ΔW‖² of what was copied, where an error is to be put in proportion to the whole."""
    total = 0.0
    for task in plan.tasks:
        entry = task.job.whole
        if task.ready is not None and entry is not None and entry.kind.additive:
            total += plan.adapter.weights(entry).norm_squared()
    return total


def _task_detail(task: Task, result: _Result | None) -> dict[str, Any]:
    if result is None:
        return _detail(task, 0.0, task.job.entries[0].facts.rank)
    return _detail(task, (result.error / result.norm) ** 0.5 if result.error else 0.0, result.rank)


def _detail(task: Task, error: float, rank: int | None) -> dict[str, Any]:
    return {
        "module": task.job.label,
        "algorithm": task.kind.name,
        "rank": rank if rank is not None else task.job.entries[0].facts.rank,
        "change": ", ".join(name for name in CHANGES if name in task.changes) or "renamed",
        "relative_error": error,
    }
