"""Adapters written anew, the running half: take apart, choose ranks, compute, measure what is lost, write."""

from __future__ import annotations

import math
import struct
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.algorithms._weights import ALPHA, THIN, FitSpec, Stated
from adaptkit.errors import NonFinite, NotRepresentable
from adaptkit.files.header import DTYPES as WIDTHS
from adaptkit.files.header import TensorSpec
from adaptkit.formats._format import Alpha
from adaptkit.keymap import algorithms
from adaptkit.ops._common import FLOATS, WriterReport, stored_dtype, torch_dtype
from adaptkit.ops._peft import Module, adapter_file, diffusers_metadata, factor_rows, peft_config
from adaptkit.ops._ranks import largest
from adaptkit.ops._recast import CHANGES, Copied, Recast, Task, Written, detail, product_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._weights import Decomposition, Weights
    from adaptkit.files.sink import Spool, TensorSink
    from adaptkit.ops._common import Progress
    from adaptkit.ops._recast import Term
    from adaptkit.policy import Module as Choice

__all__ = ["Report", "check_peft", "run"]

SPOOL = 256_000_000  # bytes of computed tensors held in memory before they go to a temporary file
CORES = 200_000_000  # bytes of decompositions held from choosing ranks to keeping them; beyond, they are made again
CANCELLED = 1e-14  # of Σ ‖·‖² of the terms: float64's rounding of a sum that is zero
HEADER = 72  # bytes that the header takes per tensor beside its name: for comparing ranks; the size itself is counted exactly


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
class _Stored:
    """A slot as it is written: its keys, and the ‖·‖² of ΔW and of what was lost (None where that needs the base weight)."""

    kind: type[Weights]
    rank: int | None
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]
    norm: float | None = None
    error: float | None = None
    vanished: int = 0  # numbers that became zero in rounding
    zero: bool = False  # the terms cancel: ΔW is zero
    tensors: dict[str, Tensor] = field(default_factory=dict)
    specs: tuple[TensorSpec, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers stored, alpha aside."""
        return sum(_count(shape) for shape in self.shapes.values())


def check_peft(plan: Recast) -> None:
    """Say what PEFT cannot hold before anything is computed."""
    if plan.keys.format.alpha is Alpha.CONFIG:
        peft_config(_State(plan).modules())


def run(plan: Recast, progress: Progress | None = None) -> Report:
    """Compute what has to be computed, copy the rest as bytes, and write; the only part that reads weights."""
    started = time.perf_counter()
    state = _State(plan)
    with _spool(plan) as spool:
        if plan.steps:
            _Computing(plan, state, spool, progress).run()
        size = _Writing(plan, state, spool).write()
    return _report(plan, state, size, time.perf_counter() - started)


def _spool(plan: Recast) -> Any:
    from adaptkit.files.sink import Spool

    return Spool(SPOOL, plan.output.parent) if plan.steps else nullcontext()


class _State:
    """What is known of each task while it is worked on: its decomposition, the rank chosen, what is stored."""

    def __init__(self, plan: Recast) -> None:
        self.plan = plan
        self.taken: dict[int, Decomposition] = {}
        self.ranks: dict[int, int] = {}
        self.stored: dict[int, _Stored] = {}
        self._unchanged: dict[int, _Stored] = {}

    def copied(self, task: Task) -> bool:
        """Whether a task's tensors are taken as they are (so far as is known)."""
        return task.ready is not None and id(task) not in self.stored and not self.dropped(task)

    def dropped(self, task: Task) -> bool:
        """Whether the policy left the module out."""
        return self.ranks.get(id(task)) == 0

    def outcome(self, task: Task) -> _Stored | None:
        """What stands in the file for a task: stored, or as copied; None where it is left out."""
        if self.dropped(task):
            return None
        return self.stored.get(id(task)) or self.unchanged(task)

    def unchanged(self, task: Task) -> _Stored:
        """As the source has it; of what has yet to be computed, the best that headers tell."""
        if id(task) not in self._unchanged:
            entry, infos = task.entries[0], task.terms[0].job.adapter.source.infos
            shapes = {role: infos[key].shape for role, key in entry.tensors()}
            rank = entry.facts.rank
            alpha = 1.0 if rank is None else entry.facts.scale * rank
            self._unchanged[id(task)] = _Stored(task.kind, rank, alpha, shapes)
        return self._unchanged[id(task)]

    def modules(self) -> list[Module]:
        """The modules as a PEFT configuration names them."""
        return [self.module(task, stored) for task in self.plan.tasks if (stored := self.outcome(task)) is not None]

    def module(self, task: Task, stored: _Stored) -> Module:
        name = self.plan.keys.module(task.slot)
        # two full LoKr factors have no rank; PEFT multiplies them by alpha / r all the same, so both are 1
        rank, alpha = (1, 1.0) if stored.rank is None else (stored.rank, stored.alpha)
        return Module(name, stored.kind.name, rank, alpha, frozenset(stored.shapes), factor_rows(stored.shapes))


# computing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """A module taken apart, its rank chosen; `stored` is None where it stays as it is."""

    found: Decomposition
    rank: int
    stored: _Stored | None


def _held(result: _Stored | Decomposition | _Cut) -> int:
    """Bytes of the tensors of a result."""
    stored = result.stored if isinstance(result, _Cut) else result
    if isinstance(stored, _Stored):
        return sum(tensor.nbytes for tensor in stored.tensors.values())
    core = getattr(result, "core", None)
    return 0 if core is None else int(core.nbytes)


class _Computing:
    """One pass, where the rank of a module depends on no other; else two: modules are taken apart, then ranks are kept."""

    def __init__(self, plan: Recast, state: _State, spool: Spool, progress: Progress | None) -> None:
        self.plan, self.state, self.spool, self.progress = plan, state, spool, progress
        self.worker = _Worker(plan, state)
        self.held = 0
        twice = plan.policy is not None and not plan.policy.local
        self.total = len(plan.steps) + (sum(task.ranked for task in plan.tasks) if twice else 0)

    def run(self) -> None:
        """Fill `state`, and the spool with every computed tensor."""
        self._pass(self.plan.steps, self.worker.first, 0)
        ranked = [task for task in self.plan.tasks if id(task) in self.state.taken.keys() - self.state.ranks.keys()]
        if not ranked:
            return
        self._choose(ranked)
        cut = {id(task) for task in ranked if self._cuts(task)}
        self._pass(
            [step for step in self.plan.steps if id(step.payload) in cut], self.worker.second, len(self.plan.steps)
        )

    def _pass(self, steps: Sequence[engine.Step[Task]], kernel: Any, done: int) -> None:
        report, total = self.progress, self.total
        resources = engine.Resources.choose(self.plan.options.device, self.plan.options.memory)
        work: engine.Work[Task, Any] = engine.Work(self.worker.load, kernel, self._store, _held)
        engine.run(steps, work, resources, None if report is None else lambda n: report(done + n, total))

    def _store(self, task: Task, result: _Stored | Decomposition | _Cut) -> None:
        if isinstance(result, _Cut):
            self.state.taken[id(task)], self.state.ranks[id(task)] = result.found, result.rank
            if result.stored is not None:
                self._store(task, result.stored)
            return
        if not isinstance(result, _Stored):
            core = getattr(result, "core", None)
            self.held += 0 if core is None else core.nbytes
            self.state.taken[id(task)] = result if self.held <= CORES else result.lighter()
            return
        for key, tensor in result.tensors.items():
            self.spool.append(key, tensor)
        specs = tuple(_spec(key, tensor) for key, tensor in result.tensors.items())
        self.state.stored[id(task)] = replace(result, tensors={}, specs=specs)

    def _choose(self, ranked: Sequence[Task]) -> None:
        assert self.plan.policy is not None
        choices = [_choice(self.plan, task, self.state.taken[id(task)]) for task in ranked]
        measure = _Measure(self.plan, self.state, ranked, self.spool)
        for task, rank in zip(ranked, self.plan.policy.choose(choices, measure), strict=True):
            self.state.ranks[id(task)] = rank

    def _cuts(self, task: Task) -> bool:
        """Whether anything is to be computed: not where all of a module's rank stays in its own tensors, or none of it."""
        rank = self.state.ranks[id(task)]
        return rank > 0 and not _stays(self.state, task, self.state.taken[id(task)], rank)


def _choice(plan: Recast, task: Task, found: Decomposition) -> Choice:
    """What a policy knows of a module: by rank, 0 first, the bytes of its data and about those it takes in the header."""
    from adaptkit.policy import Module as Choice

    width = WIDTHS[_dtype(plan, task)] // 8
    name = len(plan.keys.stem(task.slot)) + HEADER
    alpha = 1 if plan.keys.format.alpha is Alpha.TENSOR and ALPHA in task.kind.roles else 0
    tensors = len(found.shapes(1)) + alpha
    sizes = [n and n * width + 4 * alpha + tensors * name for n in found.elements()]
    return Choice(found.energies, found.norm, sizes, task.convolution)


def _stays(state: _State, task: Task, found: Decomposition, rank: int) -> bool:
    """Whether a module keeps all it has, in the tensors it has."""
    return (
        task.ready is not None
        and rank == len(found.energies)
        and found.shapes(rank).keys() == state.unchanged(task).shapes.keys()
        and all(_count(found.shapes(rank)[r]) == _count(s) for r, s in state.unchanged(task).shapes.items())
    )


class _Measure:
    """The exact size of the file for any choice of ranks: its header is built, nothing is computed."""

    def __init__(self, plan: Recast, state: _State, ranked: Sequence[Task], spool: Spool) -> None:
        self.plan, self.ranked, self.spool = plan, ranked, spool
        self.state = _State(plan)
        self.state.taken, self.state.stored = state.taken, dict(state.stored)
        self.made: dict[tuple[int, int], _Stored | None] = {}

    def __call__(self, ranks: Sequence[int]) -> int:
        from adaptkit.files.header import build_header

        state = self.state
        for task, rank in zip(self.ranked, ranks, strict=True):
            state.ranks[id(task)] = rank
            stored = self._at(task, rank) if rank else None
            if stored is None:
                state.stored.pop(id(task), None)
            else:
                state.stored[id(task)] = stored
        writing = _Writing(self.plan, state, self.spool)
        specs = writing.specs()
        header, _ = build_header(specs, writing.metadata())
        return len(header) + sum(_count(spec.shape) * WIDTHS[spec.dtype] // 8 for spec in specs)

    def _at(self, task: Task, rank: int) -> _Stored | None:
        """What is stored at a rank, None where the module stays as it is; most keep their rank from one call to the next."""
        place = (id(task), rank)
        if place not in self.made:
            stays = _stays(self.state, task, self.state.taken[id(task)], rank)
            self.made[place] = None if stays else self._stored(task, rank)
        return self.made[place]

    def _stored(self, task: Task, rank: int) -> _Stored:
        shapes = self.state.taken[id(task)].shapes(rank)
        dtype = _dtype(self.plan, task)
        specs = [TensorSpec(name, dtype, shape) for _, name, shape in _named(self.plan, task, task.kind, shapes)]
        if ALPHA in task.kind.roles and self.plan.keys.format.alpha is Alpha.TENSOR:
            specs.append(TensorSpec(self.plan.keys.spell(task.slot, task.kind.name, ALPHA), "F32", ()))
        return _Stored(task.kind, rank, float(rank), shapes, specs=tuple(specs))


def _named(
    plan: Recast, task: Task, kind: type[Weights], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(role, key, shape as the format lays it out) of every tensor but alpha."""
    peft = plan.keys.format.peft
    facts = kind.facts(shapes)
    for role, shape in shapes.items():
        name = plan.keys.spell(task.slot, kind.name, kind.stored_as(role, peft=peft))
        yield role, name, kind.laid_out(role, shape, facts, peft=peft)


def _dtype(plan: Recast, task: Task) -> str:
    """The widest dtype among the parts, or the one asked for."""
    kept = {dtype for dtype in task.dtypes if not dtype.startswith(("I", "U", "BOOL"))}
    if not kept <= set(FLOATS):
        raise NotRepresentable(
            f"stored as {', '.join(sorted(kept - set(FLOATS)))}; only plain floats can be computed with"
        )
    widest = min(kept, key=FLOATS.index) if len(kept) == 1 or "F32" in kept or "F64" in kept else "F32"
    return stored_dtype(plan.options.dtype, widest)


class _Worker:
    """What is computed of one task."""

    def __init__(self, plan: Recast, state: _State) -> None:
        self.plan, self.state = plan, state

    def load(self, task: Task) -> dict[str, Tensor]:
        """Every tensor of every term, and the base weight where it is needed."""
        found: dict[str, Tensor] = {}
        for number, term in enumerate(task.terms):
            for n, entry in enumerate(term.job.entries):
                tensors = term.job.adapter.read(entry)
                found |= {f"{number}.{n}/{role}": tensor for role, tensor in tensors.items()}
        if task.base is not None and self.plan.base is not None:
            found["base"] = self.plan.base.read(task.base)
        return found

    def first(self, tasks: Sequence[Task], tensors: dict[str, Tensor]) -> list[_Stored | Decomposition | _Cut]:
        """Take apart what has a rank to choose, and keep what can be known by itself; store the rest."""
        return [self._guarded(self._first, task, tensors, n) for n, task in enumerate(tasks)]

    def second(self, tasks: Sequence[Task], tensors: dict[str, Tensor]) -> list[_Stored]:
        """Keep the ranks chosen."""
        return [self._guarded(self._second, task, tensors, n) for n, task in enumerate(tasks)]

    def _guarded(self, work: Any, task: Task, tensors: Mapping[str, Tensor], n: int) -> Any:
        try:
            return work(task, {name: tensor[n] for name, tensor in tensors.items()})
        except (NotRepresentable, NonFinite) as error:
            raise error.at(file=task.terms[0].job.adapter.source.path, tensor=task.label) from None

    def _first(self, task: Task, tensors: Mapping[str, Tensor]) -> _Stored | Decomposition | _Cut:
        exact = self._exact(task, tensors)
        if len(task.terms) > 1 and exact.additive and self._cancel(task, exact, tensors):
            return self._nothing(task, exact)
        if task.ranked:
            exact = exact.widened()
            taken = self._taken(task, exact, tensors)
            return self._cut(task, exact, taken, tensors) if self.plan.policy and self.plan.policy.local else taken
        whole = exact if isinstance(exact, task.kind) else self._changed(task, exact)
        found = self._store(task, exact if whole.additive else whole, whole, tensors)
        if found.norm is not None and not math.isfinite(found.norm):
            _finite(task, tensors)
            raise NonFinite("ΔW overflows")
        return found

    def _taken(self, task: Task, exact: Weights, tensors: Mapping[str, Tensor]) -> Decomposition:
        try:
            found = task.kind.decompose(exact, self._spec(task))
        except (NonFinite, RuntimeError):  # LAPACK does not converge on NaN
            _finite(task, tensors)
            raise
        if not math.isfinite(found.norm):
            _finite(task, tensors)
            raise NonFinite("ΔW overflows")
        return found

    def _cut(self, task: Task, exact: Weights, found: Decomposition, tensors: Mapping[str, Tensor]) -> _Cut:
        assert self.plan.policy is not None
        (rank,) = self.plan.policy.choose([_choice(self.plan, task, found)])
        stored = None
        if rank > 0 and not _stays(self.state, task, found, rank):
            stored = self._store(task, exact, found.keep(exact, rank), tensors, found)
        return _Cut(found.lighter(), rank, stored)

    def _cancel(self, task: Task, exact: Weights, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the terms of a sum leave nothing but rounding."""
        parts = (self._term(task, number, term, tensors) for number, term in enumerate(task.terms))
        return exact.norm_squared() <= CANCELLED * sum(part.norm_squared() for part in parts)

    def _nothing(self, task: Task, exact: Weights) -> _Stored:
        """A ΔW of zero, in the smallest form there is."""
        if any(entry.facts.vector for entry in task.entries) or task.kernel is None:
            return replace(self._store(task, exact, exact.times(0.0), {}), zero=True)
        lora = algorithms()["lora"].fit(exact.delta() * 0.0, FitSpec(1, task.kernel))
        return replace(self._store(task, lora, lora, {}), zero=True)

    def _changed(self, task: Task, weights: Weights) -> Weights:
        """In another algorithm: exactly where it can be, else the nearest."""
        try:
            return task.kind.exactly(weights, task.kernel)
        except NotRepresentable:
            if not task.kind.extractable or not weights.additive:
                raise
            return task.kind.fit(weights.delta(), self._spec(task))

    def _second(self, task: Task, tensors: Mapping[str, Tensor]) -> _Stored:
        exact, found = self._exact(task, tensors), self.state.taken[id(task)]
        kept = found.keep(exact, self.state.ranks[id(task)])
        return self._store(task, exact.widened(), kept, tensors, found)

    def _spec(self, task: Task) -> FitSpec:
        options = self.plan.options
        if task.kernel is None:
            raise NotRepresentable("the stored shapes do not tell the kernel size of this layer")
        rank = largest(options, convolution=task.convolution)
        return FitSpec(rank, task.kernel, options.factor)

    # the exact weights ----------------------------------------------------------------------------------------------

    def _exact(self, task: Task, tensors: Mapping[str, Tensor]) -> Weights:
        """All terms together, in the target's order of rows of the new format, nothing rounded."""
        parts = [self._term(task, number, term, tensors) for number, term in enumerate(task.terms)]
        whole = parts[0] if len(parts) == 1 and self.plan.mixing is None else self._together(task, parts)
        return whole.swapped() if self.plan.keys.swapped(task.slot) else whole

    def _together(self, task: Task, parts: Sequence[Weights]) -> Weights:
        vector = any(entry.facts.vector for entry in task.entries)
        if self.plan.mixing is not None and not vector:
            return self._mixed(task, parts)
        if vector:
            return type(parts[0]).sum(parts)
        kind = algorithms()["full" if task.kind.name == "full" or self._thick(task, parts) else "lora"]
        return kind.sum([part if type(part) is kind else kind.exactly(part, task.kernel) for part in parts])

    def _thick(self, task: Task, parts: Sequence[Weights]) -> bool:
        """Whether the sum is better taken as a matrix than by its factors: to decompose it, or where ranks exceed its sides."""
        if any(part.kron_factors() is not None or type(part).name == "full" for part in parts):
            return True
        rank = sum(product_rank(term) for term in task.terms)
        smaller = min(task.entries[0].facts.columns, parts[0].rows)
        return rank > smaller * (THIN if task.ranked else 1.0)

    def _mixed(self, task: Task, parts: Sequence[Weights]) -> Weights:
        from adaptkit.linalg.mixing import mix

        assert self.plan.mixing is not None
        how = self.plan.mixing
        numbers = [term.number for term in task.terms]
        deltas = [part.delta() for part in parts]
        label = task.label
        mixed = mix(deltas, how.method, how.density, [f"{how.seed}/{number}/{label}" for number in numbers])
        full = algorithms()["full"]
        return full(mixed, task.kernel or ())  # type: ignore[call-arg]

    def _term(self, task: Task, number: int, term: Term, tensors: Mapping[str, Tensor]) -> Weights:
        weights = self._joined(task, number, term, tensors)
        if "base" in tensors and not (type(weights) is task.kind or self._resizes(task, weights)):
            base = _wide(tensors["base"])
            changed = weights.apply(base.clone(), term.weight) - base
            return algorithms()["full"](changed, task.kernel or ())  # type: ignore[call-arg]
        return weights if term.weight == 1.0 else weights.times(term.weight)

    def _resizes(self, task: Task, weights: Weights) -> bool:
        """Whether the base is only for measuring: the kind stays, or stays what it becomes when it is resized."""
        return task.ranked and not weights.additive and type(weights).resized == task.kind.name

    def _joined(self, task: Task, number: int, term: Term, tensors: Mapping[str, Tensor]) -> Weights:
        """The parts of one adapter, cut and put together."""
        found: list[Weights | None] = []
        entries = iter(enumerate(term.job.entries))
        if not task.ranked and task.changes & {
            "summed",
            "changed",
        }:  # so that only the rounding of what is stored is lost
            tensors = {name: _wide(tensor) for name, tensor in tensors.items()}
        for part in term.job.parts:
            if part.entry is None:
                found.append(None)
                continue
            n, entry = next(entries)
            weights = entry.decode({role: tensors[f"{number}.{n}/{role}"] for role, _ in entry.tensors()})
            found.append(weights if part.cut is None else weights.part(*part.cut))
        known = [weights for weights in found if weights is not None]
        if len(found) == 1:
            return known[0]
        if len({type(weights) for weights in known}) > 1:
            kernel = term.job.entries[0].facts.kernel
            found = [None if w is None else task.kind.exactly(w, kernel) for w in found]
            known = [weights for weights in found if weights is not None]
        like = known[0]
        filled = [
            like.zeros(like, part.rows) if w is None else w for w, part in zip(found, term.job.parts, strict=True)
        ]
        return type(like).fuse(filled)

    # what is stored -------------------------------------------------------------------------------------------------

    def _store(
        self,
        task: Task,
        exact: Weights,
        kept: Weights,
        tensors: Mapping[str, Tensor],
        taken: Decomposition | None = None,
    ) -> _Stored:
        """Round to what is written, and measure what that leaves of the exact weights."""
        kind, place = type(kept), self.plan.keys.format.alpha
        folded = kept.folded() if "folded" in task.changes or (place is Alpha.NONE and not kept.bounded) else kept
        dtype = torch_dtype(_dtype(self.plan, task))
        whole = folded.encode()
        encoded = {role: _rounded(role, tensor, dtype) for role, tensor in whole.items()}
        shapes = {role: tuple(tensor.shape) for role, tensor in encoded.items() if role != ALPHA}
        alpha = None if ALPHA not in encoded else Stated(float(encoded[ALPHA]))
        facts = kind.facts(shapes, alpha)
        rounded = kind.decode({role: encoded[role] for role in shapes}, facts)
        norm, error = _lost(exact, rounded, tensors.get("base"), None if taken is None else taken.norm)
        found = {
            name: encoded[role].reshape(shape).contiguous().cpu()
            for role, name, shape in _named(self.plan, task, kind, shapes)
        }
        if ALPHA in encoded and not self._silent(task, kind, facts.scale):
            found[self.plan.keys.spell(task.slot, kind.name, ALPHA)] = encoded[ALPHA].contiguous().cpu()
        value = 0.0 if alpha is None else alpha.value
        vanished = sum(_vanished(whole[role], encoded[role]) for role in shapes)
        return _Stored(kind, facts.rank, value, shapes, norm, error, vanished, tensors=found)

    def _silent(self, task: Task, kind: type[Weights], scale: float) -> bool:
        """Whether the format says nothing of alpha."""
        if kind.bounded:
            return False
        place = self.plan.keys.format.alpha
        if "folded" in task.changes and place is not Alpha.TENSOR:
            return True
        return place in (Alpha.NONE, Alpha.CONFIG) or (place is Alpha.OPTIONAL and scale == 1.0)


def _wide(tensor: Tensor) -> Tensor:
    from adaptkit.linalg.precision import accumulate_dtype

    return tensor.to(accumulate_dtype(tensor.device)) if tensor.is_floating_point() else tensor


def _finite(task: Task, tensors: Mapping[str, Tensor]) -> None:
    """NonFinite with the key of the tensor: a decomposition would only say that it did not converge."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            number, _, rest = name.partition(".")
            n, _, role = rest.partition("/")
            if name == "base":
                raise NonFinite("the base weight holds NaN or infinity")
            job = task.terms[int(number)].job
            raise NonFinite(
                "holds NaN or infinity", file=job.adapter.source.path, tensor=job.entries[int(n)].keys[role]
            )


def _rounded(role: str, tensor: Tensor, dtype: Any) -> Tensor:
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


def _vanished(before: Tensor, after: Tensor) -> int:
    """How many numbers rounding made zero."""
    from adaptkit.linalg.precision import upcast

    if before.dtype == after.dtype or not before.is_floating_point():
        return 0
    left = int(upcast(after).count_nonzero())
    return 0 if left == after.numel() else int(before.count_nonzero()) - left


def _lost(
    exact: Weights, stored: Weights, base: Tensor | None, norm: float | None
) -> tuple[float | None, float | None]:
    """‖ΔW‖² (known where it was taken apart) and the ‖·‖² of what was lost, in float64.

    None where ΔW depends on a base weight that is not given.
    """
    from adaptkit.algorithms._algebra import distance_squared

    if exact.additive and stored.additive:
        return exact.norm_squared() if norm is None else norm, distance_squared(exact, stored, norm)
    if base is None:
        return None, None
    weight = base.double()
    one, two = exact.apply(weight.clone(), 1.0), stored.apply(weight.clone(), 1.0)
    return float((one - weight).square().sum()), float((one - two).square().sum())


def _spec(key: str, tensor: Tensor) -> TensorSpec:
    from adaptkit.files.sink import spec_of

    return spec_of(key, tensor)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


# writing -----------------------------------------------------------------------------------------------------------


class _Writing:
    """The file, or PEFT's folder, of all that was copied and stored."""

    def __init__(self, plan: Recast, state: _State, spool: Spool | None) -> None:
        self.plan, self.state, self.spool = plan, state, spool
        kept = [task for task in plan.tasks if state.copied(task)]
        ready = [item for task in kept for item in task.ready or ()]
        self.copied = [item for item in (*ready, *plan.carried) if isinstance(item, Copied)]
        self.scalars = {item.key: struct.pack("<f", item.value) for item in ready if isinstance(item, Written)}

    def write(self) -> int:
        """Publish the output, and its size in bytes."""
        from adaptkit.files.sink import TensorSink

        plan, metadata = self.plan, self.metadata()
        specs = self.specs()
        modules = self.state.modules() if plan.keys.format.alpha is Alpha.CONFIG else None
        with adapter_file(plan.output, modules, plan.options.overwrite) as (path, overwrite):
            return self._write(TensorSink(path, specs, metadata, overwrite=overwrite), metadata)

    def _write(self, sink: TensorSink, metadata: Mapping[str, str]) -> int:
        with sink:
            hashing = _Hashing(self, sink, metadata)
            for number, adapter in enumerate(self.plan.adapters):
                mine = [(item.key, adapter.source, item.source) for item in self.copied if item.number == number]
                sink.copy_many(mine)
            for key, data in self.scalars.items():
                sink.put_bytes(key, memoryview(data))
            if self.spool is not None:
                self.spool.write_to(sink)
            if hashing.needed:
                sink.restate(hashing.result())
            # it can be made again from its input, so nobody waits for the disk; unless it replaces that input
            sink.commit(sync=self.plan.output.exists())
        return sink.size

    def specs(self) -> list[TensorSpec]:
        """In the order that the official library writes: wide dtypes first, then by name."""
        found = [item.spec for item in self.copied]
        found += [TensorSpec(key, "F32", ()) for key in self.scalars]
        for stored in self.state.stored.values():
            found += stored.specs
        twice = [name for name, n in Counter(spec.name for spec in found).items() if n > 1]
        if twice:
            raise NotRepresentable(
                f"two modules would both be written as {twice[0]}", file=self.plan.adapter.source.path
            )
        return sorted(found, key=lambda spec: (-WIDTHS[spec.dtype], spec.name))

    def metadata(self) -> dict[str, str]:
        """What the inputs had where it still holds, and one record of what was done."""
        from adaptkit.files.provenance import sshs_places, updated

        plan = self.plan
        kept = {name: value for name, value in _common(plan).items() if name != "lora_adapter_metadata"}
        changed = self._ranks() | self._network() | self._for_diffusers()
        return updated(kept | changed, _record(plan)) | sshs_places(plan.adapter.metadata)

    def _ranks(self) -> dict[str, str]:
        """`ss_network_dim` and `ss_network_alpha` where the file has them and they no longer hold."""
        still = {"renamed", "split", "swapped", "cast"}
        if "ss_network_dim" not in self.plan.adapter.metadata or self.plan.counts().keys() <= still:
            return {}
        modules = [module for module in self.state.modules() if module.algorithm != "full"]
        dims, alphas = {m.rank for m in modules}, {m.alpha for m in modules}
        return {
            "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        }

    def _network(self) -> dict[str, str]:
        """`ss_network_module` where the algorithm changed."""
        if "ss_network_module" not in self.plan.adapter.metadata or "changed" not in self.plan.counts():
            return {}
        kinds = {task.kind.name for task in self.plan.tasks}
        return {"ss_network_module": "networks.lora" if kinds <= {"lora"} else "lycoris.kohya"}

    def _for_diffusers(self) -> dict[str, str]:
        """diffusers before 0.42 takes the first module's rank for every alpha: where ranks differ it has to be told."""
        if self.plan.keys.format.name != "diffusers":
            return {}
        parts: dict[str, list[Module]] = {}
        for task in self.plan.tasks:
            stored = self.state.outcome(task)
            if stored is None:
                continue
            if stored.kind.name not in ("lora", "lora+dora"):
                return {}
            parts.setdefault(task.slot.component, []).append(self.state.module(task, stored))
        if all(len({m.rank for m in modules}) == 1 for modules in parts.values()):
            return {}
        return {"lora_adapter_metadata": diffusers_metadata(parts)}

    def data(self, names: Sequence[str]) -> Iterator[memoryview]:
        """The bytes of every tensor of the output, in order."""
        copied = {item.key: item for item in self.copied}
        for name in names:
            if name in copied:
                yield self.plan.adapters[copied[name].number].source.raw(copied[name].source)
            elif name in self.scalars:
                yield memoryview(self.scalars[name])
            elif self.spool is not None:
                yield self.spool.read(name)


def _common(plan: Recast) -> dict[str, str]:
    """The metadata that all inputs agree on."""
    first, *others = (adapter.metadata for adapter in plan.adapters)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _record(plan: Recast) -> dict[str, Any]:
    """The one provenance record. No date: equal inputs give equal bytes."""
    from adaptkit.ops._ranks import asked

    sources = [adapter.source.path.name for adapter in plan.adapters]
    record: dict[str, Any] = {"adaptkit": __version__, "command": plan.command}
    if len(sources) == 1 and plan.weights == (1.0,):
        record["source"] = sources[0]
    else:
        record["sources"] = [{"file": name, "weight": w} for name, w in zip(sources, plan.weights, strict=True)]
    record |= {"from": plan.adapter.format.name, "to": plan.keys.format.name, **plan.counts()}
    rule = asked(plan.options)
    if rule is not None:
        record[rule] = getattr(plan.options, rule)
    for name in ("conv_rank", "max_rank", "algo"):
        if getattr(plan.options, name) is not None:
            record[name] = getattr(plan.options, name)
    if plan.mixing is not None:
        record |= {"method": plan.mixing.method, "density": plan.mixing.density, "seed": plan.mixing.seed}
    return record


class _Hashing:
    """sd-scripts' hashes, where the file had them, of what it will hold; worked out while the tensors are copied."""

    def __init__(self, writing: _Writing, sink: TensorSink, metadata: Mapping[str, str]) -> None:
        from adaptkit.files.provenance import SSHS

        self.metadata = metadata
        self.needed = bool(SSHS.keys() & metadata.keys())
        self._found: dict[str, str] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(writing, sink), daemon=True)
        if self.needed:
            self._thread.start()

    def _run(self, writing: _Writing, sink: TensorSink) -> None:
        from adaptkit.files.header import build_header
        from adaptkit.files.provenance import sshs_hashes

        try:
            training = {name: value for name, value in self.metadata.items() if name.startswith("ss_")}
            header, _ = build_header(sink.infos.values(), training)
            self._found = sshs_hashes(writing.data(list(sink.infos)), len(header))
        except BaseException as error:
            self._failure = error

    def result(self) -> dict[str, str]:
        """The metadata with the hashes in their places."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {name: self._found.get(name, value) for name, value in self.metadata.items()}


# reporting ---------------------------------------------------------------------------------------------------------


def _report(plan: Recast, state: _State, size: int, seconds: float) -> Report:
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
        details=tuple(_detail(state, task, found) for task, found in zip(plan.tasks, lost, strict=True)),
        family=plan.adapter.family.name,
        source_format=plan.adapter.format.name,
        format=plan.keys.format.name,
        changes=_changes(plan, state),
        notes=(*plan.notes, *_notes(plan, state)),
    )


def _changes(plan: Recast, state: _State) -> dict[str, int]:
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


def _loss(state: _State, task: Task) -> tuple[float, float] | None:
    """‖ΔW‖² and what was lost of it; None where nothing was computed, or nobody can say."""
    stored, found = state.stored.get(id(task)), state.taken.get(id(task))
    if stored is not None and stored.norm is not None and stored.error is not None:
        return stored.norm, stored.error
    if found is None or (stored is not None and not task.kind.additive):
        return None
    return found.norm, found.norm if state.dropped(task) else 0.0


def _untouched(plan: Recast, state: _State) -> float:
    """‖ΔW‖² of what was copied, where an error is to be put in proportion to the whole."""
    total = 0.0
    for task in plan.tasks:
        if state.copied(task) and id(task) not in state.taken and task.kind.additive:
            total += task.terms[0].job.adapter.weights(task.entries[0]).norm_squared()
    return total


def _detail(state: _State, task: Task, lost: tuple[float, float] | None) -> dict[str, Any]:
    stored = state.outcome(task)
    error = (
        None if lost is None and id(task) in state.stored else (lost[1] / lost[0]) ** 0.5 if lost and lost[1] else 0.0
    )
    if stored is None:
        return {**detail(task, 1.0, 0), "change": "left out"}
    found = {**detail(task, error, stored.rank), "algorithm": stored.kind.name}
    if task.ranked:
        found["rank_before"] = task.entries[0].facts.rank
    return found


def _notes(plan: Recast, state: _State) -> Iterator[str]:
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
    directions = sum(1 for task in ranked if not task.kind.additive and id(task) in state.stored and task.base is None)
    if directions:
        yield (
            f"{directions} DoRA modules: their directions were resized and their magnitudes kept; how far the merged weights "
            "move depends on the checkpoint. --base measures it."
        )
    wide = sum(1 for stored in state.stored.values() if _too_wide(stored))
    if wide:
        yield f"{wide} modules take more than their full difference would; --rank or --size makes them smaller."


def _too_wide(stored: _Stored) -> bool:
    if stored.kind.name != "lora" or stored.rank is None:
        return False
    up, down = stored.shapes["up"], stored.shapes["down"]
    return stored.parameters > up[0] * _count(down[1:])
