"""Rewrite adapters: decompose, choose ranks, compute, measure the error, write."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.algorithms.contract import ALPHA
from adaptkit.errors import NotRepresentable
from adaptkit.files.header import TensorSpec
from adaptkit.formats.contract import Alpha
from adaptkit.ops.adapter_file.peft_config import check_window, peft_config
from adaptkit.ops.adapter_file.verdict import loading
from adaptkit.ops.ranks.weighing import weighed
from adaptkit.ops.rewrite.compute import Rewriter
from adaptkit.ops.rewrite.output import Output
from adaptkit.ops.rewrite.report import Report, report_of
from adaptkit.ops.rewrite.state import Cut, State, Stored, curve_of, dtype_of, named, stays
from adaptkit.ops.rewrite.verify import Verifier
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Decomposition
    from adaptkit.files.sink import TensorSink
    from adaptkit.files.spool import Spool
    from adaptkit.ops.rewrite.plan import Recast, Task
    from adaptkit.ops.stages import Progress

__all__ = ["check_peft", "run"]

SPOOL = 256_000_000  # bytes of computed tensors held in memory before they go to a temporary file
STACK = 16  # modules of equal shape that a CPU computes at once, at most
CORES = 200_000_000  # bytes of decompositions held until ranks are cut; others are made again


def check_peft(plan: Recast) -> None:
    """Refuse what PEFT cannot hold before anything is computed."""
    if plan.keys.format.alpha is Alpha.CONFIG:
        path = plan.adapter.source.path
        for task in plan.tasks:
            first = task.entries[0]
            kept = first.kind is task.kind and not task.ranked
            try:
                check_window(task.kind, task.kernel, first.keys if kept else task.kind.forms[0])
            except NotRepresentable as error:
                raise error.at(file=path, tensor=task.label) from None
        try:
            peft_config(State(plan).modules())
        except NotRepresentable as error:
            raise error.at(file=path) from None


def run(plan: Recast, progress: Progress | None = None) -> Report:
    """Compute changed tensors, copy the rest as bytes, and write.

    This is the only part that reads weights.
    """
    started = time.perf_counter()
    state = State(plan)
    with _spool(plan) as spool:
        computing = _Computing(plan, state, spool, progress)
        computing.first()
        verifier = Verifier(plan, state, progress) if plan.options.verify else None
        size = Output(plan, state, spool).write(computing.second, verifier, progress)
    measured = None if verifier is None else verifier.measured
    seconds = time.perf_counter() - started
    told = loading(plan.output, plan.adapter.family.name if plan.adapter.known else None)
    found = report_of(plan, state, size, seconds, measured)
    return replace(found, notes=(*found.notes, *computing.notes), **told)


def _spool(plan: Recast) -> Any:
    from adaptkit.files.spool import Spool

    return Spool(SPOOL, plan.output)


def _held(result: Stored | Decomposition | Cut) -> int:
    """Bytes of the tensors of a result."""
    stored = result.stored if isinstance(result, Cut) else result
    if isinstance(stored, Stored):
        return sum(tensor.nbytes for tensor in stored.tensors.values())
    core = getattr(result, "core", None)
    return 0 if core is None else int(core.nbytes)


class _Computing:
    """Run the engine once, or twice if the rank of a module depends on other modules.

    The first pass decomposes, the second cuts to the ranks chosen.
    """

    def __init__(self, plan: Recast, state: State, spool: Spool, progress: Progress | None) -> None:
        self.plan, self.state, self.progress = plan, state, progress
        self.worker, self.put = Rewriter(plan, state), spool.append
        self.held = 0
        self.notes: dict[str, None] = {}
        self.cut: list[engine.Step[Task]] = []  # the steps of the second pass

    def first(self) -> None:
        """Fill `state` with every tensor of the output; the spool has those computed so far."""
        self._pass(self.plan.steps, self.worker.first, "fitting")
        ranked = [
            task
            for task in self.plan.tasks
            if task.number in self.state.decomposed.keys() - self.state.ranks.keys()
        ]
        if ranked:
            told = counting(self.progress, "choosing", len(ranked), "modules")
            self._choose(ranked)
            if told is not None:
                told(len(ranked))
            cut = {task.number for task in ranked if self._cuts(task)}
            self.cut = [step for step in self.plan.steps if step.payload.number in cut]

    def second(self, sink: TensorSink) -> None:
        """Cut to the ranks that were chosen, straight into the output."""
        self.put = sink.put
        self._pass(self.cut, self.worker.second, "cutting")

    def _pass(self, steps: Sequence[engine.Step[Task]], kernel: Any, stage: str) -> None:
        if not steps:
            return
        options = self.plan.options
        resources = engine.Resources.choose(options.device, options.memory, gains=False)
        work: engine.Work[Task, Any] = engine.Work(
            self.worker.load, kernel, self._store, _held, STACK
        )
        told = counting(self.progress, stage, len(steps), "modules")
        self.notes |= dict.fromkeys(engine.run(steps, work, resources, told))

    def _store(self, task: Task, result: Stored | Decomposition | Cut) -> None:
        if isinstance(result, Cut):
            self.state.decomposed[task.number], self.state.ranks[task.number] = (
                result.found,
                result.rank,
            )
            if result.stored is not None:
                self._store(task, result.stored)
            return
        if not isinstance(result, Stored):
            core = getattr(result, "core", None)
            self.held += 0 if core is None else core.nbytes
            self.state.decomposed[task.number] = result if self.held <= CORES else result.lighter()
            return
        for key, tensor in result.tensors.items():
            self.put(key, tensor)
        specs = tuple(_spec(key, tensor) for key, tensor in result.tensors.items())
        self.state.stored[task.number] = replace(result, tensors={}, specs=specs)

    def _choose(self, ranked: Sequence[Task]) -> None:
        assert self.plan.policy is not None
        choices = [curve_of(self.plan, task, self.state.decomposed[task.number]) for task in ranked]
        measure = _Measure(self.plan, self.state, ranked)
        if self.plan.norms is None:
            ranks = self.plan.policy.choose(choices, measure)
        else:
            found = weighed(self.plan.policy, choices, self.plan.norms(ranked), measure)
            ranks = found.ranks
            self.notes[found.note()] = None
        for task, rank in zip(ranked, ranks, strict=True):
            self.state.ranks[task.number] = rank
            if rank and (stored := measure.at(task, rank)) is not None:
                self.state.stored[task.number] = stored

    def _cuts(self, task: Task) -> bool:
        """Whether a module is cut: its rank is not 0, and not what its own tensors hold."""
        rank = self.state.ranks[task.number]
        return rank > 0 and not stays(self.state, task, self.state.decomposed[task.number], rank)


class _Measure:
    """The exact size of the file for any choice of ranks, from its header alone."""

    def __init__(self, plan: Recast, state: State, ranked: Sequence[Task]) -> None:
        self.plan, self.ranked = plan, ranked
        self.state = State(plan)
        self.state.decomposed, self.state.stored = state.decomposed, dict(state.stored)
        self.made: dict[tuple[int, int], Stored | None] = {}

    def __call__(self, ranks: Sequence[int]) -> int:
        state = self.state
        for task, rank in zip(self.ranked, ranks, strict=True):
            state.ranks[task.number] = rank
            stored = self.at(task, rank) if rank else None
            if stored is None:
                state.stored.pop(task.number, None)
            else:
                state.stored[task.number] = stored
        return Output(self.plan, state, None).size()

    def at(self, task: Task, rank: int) -> Stored | None:
        """What is stored at a rank; None if the module stays as it is.

        Cached, since most modules keep their rank from one call to the next.
        """
        place = (task.number, rank)
        if place not in self.made:
            same = stays(self.state, task, self.state.decomposed[task.number], rank)
            self.made[place] = None if same else self._stored(task, rank)
        return self.made[place]

    def _stored(self, task: Task, rank: int) -> Stored:
        shapes = self.state.decomposed[task.number].shapes(rank)
        dtype = dtype_of(self.plan, task)
        specs = [
            TensorSpec(name, dtype, shape)
            for _, name, shape in named(self.plan, task, task.kind, shapes)
        ]
        if ALPHA in task.kind.roles and self.plan.keys.format.alpha is Alpha.TENSOR:
            specs.append(
                TensorSpec(self.plan.keys.spell(task.slot, task.kind.name, ALPHA), "F32", ())
            )
        # the full rank of a LoKr may be stored as full factors, which have no rank to a reader
        facts = task.kind.facts(shapes)
        alpha = 1.0 if facts.rank is None else float(facts.rank)
        own = task.kind.resettled(facts, task.entries[0].facts) if task.kind.peft_kept else None
        scale = 1.0 if own is None else own.scale
        found = Stored(task.kind, facts.rank, alpha, shapes, scale=scale, facts=own)
        return replace(found, specs=tuple(specs))


def _spec(key: str, tensor: Tensor) -> TensorSpec:
    from adaptkit.files.tensors import spec_of

    return spec_of(key, tensor)
