"""Adapters written anew, the running half: take apart, choose ranks, compute, measure what is lost, write."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.algorithms.contract import ALPHA
from adaptkit.files.header import DTYPES as WIDTHS
from adaptkit.files.header import TensorSpec
from adaptkit.formats.contract import Alpha
from adaptkit.ops.shared import WriterReport
from adaptkit.ops.rewrite.compute import Cut, State, Stored, Worker, choice, count, dtype_of, named, stays
from adaptkit.ops.adapter_file.peft_config import peft_config
from adaptkit.ops.rewrite.plan import CHANGES, Recast, Task, detail
from adaptkit.ops.rewrite.output import Writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Decomposition
    from adaptkit.files.sink import Spool, TensorSink
    from adaptkit.ops.shared import Progress

__all__ = ["Report", "check_peft", "run"]

SPOOL = 256_000_000  # bytes of computed tensors held in memory before they go to a temporary file
STACK = 16  # modules of equal shape that a CPU computes at once, at most
CORES = 200_000_000  # bytes of decompositions held from choosing ranks to keeping them; beyond, they are made again


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


def check_peft(plan: Recast) -> None:
    """Say what PEFT cannot hold before anything is computed."""
    if plan.keys.format.alpha is Alpha.CONFIG:
        peft_config(State(plan).modules())


def run(plan: Recast, progress: Progress | None = None) -> Report:
    """Compute what has to be computed, copy the rest as bytes, and write; the only part that reads weights."""
    started = time.perf_counter()
    state = State(plan)
    with _spool(plan) as spool:
        computing = _Computing(plan, state, spool, progress)
        computing.first()
        size = Writing(plan, state, spool).write(computing.second)
    return _report(plan, state, size, time.perf_counter() - started)


def _spool(plan: Recast) -> Any:
    from adaptkit.files.sink import Spool

    return Spool(SPOOL, plan.output.parent)


def _held(result: Stored | Decomposition | Cut) -> int:
    """Bytes of the tensors of a result."""
    stored = result.stored if isinstance(result, Cut) else result
    if isinstance(stored, Stored):
        return sum(tensor.nbytes for tensor in stored.tensors.values())
    core = getattr(result, "core", None)
    return 0 if core is None else int(core.nbytes)


class _Computing:
    """One pass, where the rank of a module depends on no other; else two: modules are taken apart, then ranks are kept."""

    def __init__(self, plan: Recast, state: State, spool: Spool, progress: Progress | None) -> None:
        self.plan, self.state, self.progress = plan, state, progress
        self.worker, self.put = Worker(plan, state), spool.append
        self.held = 0
        self.cut: list[engine.Step[Task]] = []  # what the second pass computes
        twice = plan.policy is not None and not plan.policy.local
        self.total = len(plan.steps) + (sum(task.ranked for task in plan.tasks) if twice else 0)

    def first(self) -> None:
        """Fill `state`: after this it knows every tensor of the output, and the spool has those computed so far."""
        self._pass(self.plan.steps, self.worker.first, 0)
        ranked = [
            task
            for task in self.plan.tasks
            if id(task) in self.state.taken.keys() - self.state.ranks.keys()
        ]
        if ranked:
            self._choose(ranked)
            cut = {id(task) for task in ranked if self._cuts(task)}
            self.cut = [step for step in self.plan.steps if id(step.payload) in cut]

    def second(self, sink: TensorSink) -> None:
        """Keep the ranks that were chosen, each module going where it belongs in the output."""
        self.put = sink.put
        self._pass(self.cut, self.worker.second, len(self.plan.steps))

    def _pass(self, steps: Sequence[engine.Step[Task]], kernel: Any, done: int) -> None:
        if not steps:
            return
        report, total = self.progress, self.total
        resources = engine.Resources.choose(self.plan.options.device, self.plan.options.memory)
        work: engine.Work[Task, Any] = engine.Work(
            self.worker.load, kernel, self._store, _held, STACK
        )
        engine.run(
            steps, work, resources, None if report is None else lambda n: report(done + n, total)
        )

    def _store(self, task: Task, result: Stored | Decomposition | Cut) -> None:
        if isinstance(result, Cut):
            self.state.taken[id(task)], self.state.ranks[id(task)] = result.found, result.rank
            if result.stored is not None:
                self._store(task, result.stored)
            return
        if not isinstance(result, Stored):
            core = getattr(result, "core", None)
            self.held += 0 if core is None else core.nbytes
            self.state.taken[id(task)] = result if self.held <= CORES else result.lighter()
            return
        for key, tensor in result.tensors.items():
            self.put(key, tensor)
        specs = tuple(_spec(key, tensor) for key, tensor in result.tensors.items())
        self.state.stored[id(task)] = replace(result, tensors={}, specs=specs)

    def _choose(self, ranked: Sequence[Task]) -> None:
        assert self.plan.policy is not None
        choices = [choice(self.plan, task, self.state.taken[id(task)]) for task in ranked]
        measure = _Measure(self.plan, self.state, ranked)
        for task, rank in zip(ranked, self.plan.policy.choose(choices, measure), strict=True):
            self.state.ranks[id(task)] = rank
            if rank and (stored := measure.at(task, rank)) is not None:
                self.state.stored[id(task)] = stored

    def _cuts(self, task: Task) -> bool:
        """Whether anything is to be computed: not where all of a module's rank stays in its own tensors, or none of it."""
        rank = self.state.ranks[id(task)]
        return rank > 0 and not stays(self.state, task, self.state.taken[id(task)], rank)


class _Measure:
    """The exact size of the file for any choice of ranks: its header is built, nothing is computed."""

    def __init__(self, plan: Recast, state: State, ranked: Sequence[Task]) -> None:
        self.plan, self.ranked = plan, ranked
        self.state = State(plan)
        self.state.taken, self.state.stored = state.taken, dict(state.stored)
        self.made: dict[tuple[int, int], Stored | None] = {}

    def __call__(self, ranks: Sequence[int]) -> int:
        from adaptkit.files.header import build_header

        state = self.state
        for task, rank in zip(self.ranked, ranks, strict=True):
            state.ranks[id(task)] = rank
            stored = self.at(task, rank) if rank else None
            if stored is None:
                state.stored.pop(id(task), None)
            else:
                state.stored[id(task)] = stored
        writing = Writing(self.plan, state, None)
        specs = writing.specs()
        header, _ = build_header(specs, writing.metadata())
        return len(header) + sum(count(spec.shape) * WIDTHS[spec.dtype] // 8 for spec in specs)

    def at(self, task: Task, rank: int) -> Stored | None:
        """What is stored at a rank, None where the module stays as it is; most keep their rank from one call to the next."""
        place = (id(task), rank)
        if place not in self.made:
            same = stays(self.state, task, self.state.taken[id(task)], rank)
            self.made[place] = None if same else self._stored(task, rank)
        return self.made[place]

    def _stored(self, task: Task, rank: int) -> Stored:
        shapes = self.state.taken[id(task)].shapes(rank)
        dtype = dtype_of(self.plan, task)
        specs = [
            TensorSpec(name, dtype, shape)
            for _, name, shape in named(self.plan, task, task.kind, shapes)
        ]
        if ALPHA in task.kind.roles and self.plan.keys.format.alpha is Alpha.TENSOR:
            specs.append(
                TensorSpec(self.plan.keys.spell(task.slot, task.kind.name, ALPHA), "F32", ())
            )
        return Stored(task.kind, rank, float(rank), shapes, specs=tuple(specs))


def _spec(key: str, tensor: Tensor) -> TensorSpec:
    from adaptkit.files.sink import spec_of

    return spec_of(key, tensor)


def _report(plan: Recast, state: State, size: int, seconds: float) -> Report:
    lost = [_loss(state, task) for task in plan.tasks]
    error = sum(found[1] for found in lost if found is not None)
    norm = sum(found[0] for found in lost if found is not None)
    if error:
        norm += _untouched(plan, state)
    written = [stored for task in plan.tasks if (stored := state.outcome(task)) is not None]
    return Report(
        output=plan.output,
        bytes=size,
        modules=len(written),
        parameters=sum(stored.parameters for stored in written),
        relative_error=(error / norm) ** 0.5 if error and norm else 0.0,
        unused=plan.unused,
        seconds=seconds,
        details=tuple(
            _detail(state, task, found) for task, found in zip(plan.tasks, lost, strict=True)
        ),
        family=plan.adapter.family.name,
        source_format=plan.adapter.format.name,
        format=plan.keys.format.name,
        changes=_changes(plan, state),
        notes=(*plan.notes, *_notes(plan, state)),
    )


def _changes(plan: Recast, state: State) -> dict[str, int]:
    """How many slots were renamed, resized, …; of those that might be resized also how many were not, or are left out."""
    found: Counter[str] = Counter()
    for task in plan.tasks:
        changes = task.changes or {"renamed"}
        if state.dropped(task):
            changes = {"left out"}
        elif task.ranked and id(task) not in state.stored:
            changes = task.changes - {"resized"} or {"unchanged"}
        found.update(changes)
    return {name: found[name] for name in (*CHANGES, "unchanged", "left out") if found[name]}


def _loss(state: State, task: Task) -> tuple[float, float] | None:
    """‖ΔW‖² and what was lost of it; None where nothing was computed, or nobody can say."""
    stored, found = state.stored.get(id(task)), state.taken.get(id(task))
    if stored is not None and stored.norm is not None and stored.error is not None:
        return stored.norm, stored.error
    if found is None or (stored is not None and not task.kind.additive):
        return None
    return found.norm, found.norm if state.dropped(task) else 0.0


def _untouched(plan: Recast, state: State) -> float:
    """‖ΔW‖² of what was copied, where an error is to be put in proportion to the whole."""
    total = 0.0
    for task in plan.tasks:
        if state.copied(task) and id(task) not in state.taken and task.kind.additive:
            total += task.terms[0].job.adapter.weights(task.entries[0]).norm_squared()
    return total


def _detail(state: State, task: Task, lost: tuple[float, float] | None) -> dict[str, Any]:
    stored = state.outcome(task)
    error = (
        None
        if lost is None and id(task) in state.stored
        else (lost[1] / lost[0]) ** 0.5
        if lost and lost[1]
        else 0.0
    )
    if stored is None:
        return {**detail(task, 1.0, 0), "change": "left out"}
    found = {**detail(task, error, stored.rank), "algorithm": stored.kind.name}
    if task.ranked:
        found["rank_before"] = task.entries[0].facts.rank
    return found


def _notes(plan: Recast, state: State) -> Iterator[str]:
    dropped = sum(1 for task in plan.tasks if state.dropped(task))
    if dropped:
        verb = "is" if dropped == 1 else "are"
        yield f"{dropped} of {len(plan.tasks)} modules {verb} left out: their share of ΔW is not worth its bytes."
    zero = sum(1 for stored in state.stored.values() if stored.zero)
    if zero:
        yield f"ΔW is zero in {'every module' if zero == len(plan.tasks) else f'{zero} modules'}: the inputs cancel out."
    vanished = sum(stored.vanished for stored in state.stored.values())
    if vanished:
        yield f"{vanished:,} numbers became zero in rounding; the error counts that. --dtype bf16 or fp32 keeps them."
    ranked = [task for task in plan.tasks if id(task) in state.taken]
    if ranked and not any(id(task) in state.stored for task in ranked) and not dropped:
        yield "nothing was cut: every module has no more rank than that."
    directions = sum(
        1
        for task in ranked
        if not task.kind.additive and id(task) in state.stored and task.base is None
    )
    if directions:
        yield (
            f"{directions} DoRA modules: their directions were resized and their magnitudes kept; how far the merged weights "
            "move depends on the checkpoint. --base measures it."
        )
    wide = sum(1 for stored in state.stored.values() if _too_wide(stored))
    if wide:
        yield f"{wide} modules take more than their full difference would; --rank or --size makes them smaller."


def _too_wide(stored: Stored) -> bool:
    if stored.kind.name != "lora" or stored.rank is None:
        return False
    up, down = stored.shapes["up"], stored.shapes["down"]
    return stored.parameters > up[0] * count(down[1:])
