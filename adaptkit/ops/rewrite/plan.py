"""Adapters written anew: in another format or algorithm, at another rank, or several in one. The plan, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.adapter import Adapter, Entry
from adaptkit.algorithms.contract import ALPHA, THIN
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import chosen, formats
from adaptkit.engine import Step, check_memory, peak_memory
from adaptkit.errors import (
    AdaptkitError,
    AmbiguousAdapter,
    NothingToDo,
    NotRepresentable,
    ShapeMismatch,
)
from adaptkit.files.header import TensorSpec
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import KeyMap, algorithms, compile_keys
from adaptkit.ops.shared import FLOATS, Unused, refuse_unused, selected, stored_dtype
from adaptkit.ops.adapter_file.peft_config import check_adapter_output
from adaptkit.ops.ranks.options import Ranked
from adaptkit.respelling import Job, Respelling

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Piece
    from adaptkit.names import Slot
    from adaptkit.ops.ranks.policies import Policy

__all__ = [
    "CHANGES",
    "Copied",
    "Into",
    "Recast",
    "RecastOptions",
    "Task",
    "Term",
    "Written",
    "open_all",
    "product_rank",
    "recast",
]

SANE = 1e4  # an alpha above this, where it multiplies nothing, is a placeholder (ai-toolkit writes 9999999999)
CHANGES = (
    "renamed",
    "split",
    "fused",
    "swapped",
    "folded",
    "scaled",
    "summed",
    "changed",
    "resized",
    "cast",
)


@dataclass(frozen=True)
class RecastOptions(Ranked):
    """What every verb that writes adapters anew accepts: rank options, `algo` to change the algorithm to, LoKr's `factor`, and
    the checkpoint (`base`) that gives kinds like DoRA a difference."""

    algo: str | None = None
    factor: int = 8
    base: Path | None = None


class Copied(NamedTuple):
    """A tensor taken over byte for byte from an adapter (by its number), perhaps under another shape of as many elements."""

    key: str
    source: str
    spec: TensorSpec
    number: int = 0


class Written(NamedTuple):
    """An alpha that the source does not store."""

    key: str
    value: float


class Term(NamedTuple):
    """What one adapter gives to a slot, and what that is multiplied by."""

    job: Job
    weight: float = 1.0
    number: int = 0  # of the adapter


@dataclass(frozen=True)
class Task:
    """One slot of the output: `ready` tensors that can be copied, or (None) what has to be computed, and why.

    `ranked`: a policy chooses the rank; `ready` is then what stands there if it is to stay. `base`: where the slot lies in the
    base checkpoint, for terms whose ΔW depends on it. Tasks of equal `likeness` are computed as one stack; None: alone.
    """

    slot: Slot
    terms: tuple[Term, ...]
    kind: type[Weights]
    ready: tuple[Copied | Written, ...] | None
    changes: frozenset[str] = frozenset()
    ranked: bool = False
    base: tuple[Piece, ...] | None = None
    likeness: Hashable = None

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All entries that are read for it."""
        return tuple(entry for term in self.terms for entry in term.job.entries)

    @property
    def label(self) -> str:
        """What people call it."""
        return self.terms[0].job.label

    @cached_property
    def dtypes(self) -> frozenset[str]:
        """The dtypes of all their tensors."""
        terms = (
            (term.job.adapter.source.infos, entry)
            for term in self.terms
            for entry in term.job.entries
        )
        return frozenset(infos[key].dtype for infos, entry in terms for _, key in entry.tensors())

    @cached_property
    def kernel(self) -> tuple[int, ...] | None:
        """The kernel size of the layer, None where nobody knows it."""
        known = (entry.facts.kernel for entry in self.entries)
        return next((kernel for kernel in known if kernel is not None), None)

    @property
    def convolution(self) -> bool:
        """Whether `--conv-rank` is meant: a kernel larger than 1."""
        return any(n > 1 for n in self.kernel or ())


@dataclass(frozen=True, slots=True)
class Into:
    """The format to write, and whether alpha has to go into the weights whatever the format says."""

    format: str
    fold: bool

    @property
    def config(self) -> bool:
        """Whether alpha stands in a configuration file, so that the output is a folder."""
        return formats()[self.format].alpha is Alpha.CONFIG

    @classmethod
    def plain(cls, format: str) -> Into:
        """A format as it is."""
        return cls(format, formats()[format].alpha is Alpha.NONE)


@dataclass(frozen=True)
class Recast:
    """Everything known before a weight is read."""

    command: str
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    keys: KeyMap
    options: RecastOptions
    output: Path
    tasks: tuple[Task, ...]
    carried: tuple[Copied, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[Task], ...]
    base: Checkpoint | None = None
    policy: Policy | None = None
    mixing: Mixing | None = None
    notes: tuple[str, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The first of them, whose family and metadata the output has."""
        return self.adapters[0]

    def counts(self) -> dict[str, int]:
        """How many slots are merely renamed, split, fused, folded, …"""
        found = Counter(change for task in self.tasks for change in (task.changes or {"renamed"}))
        return {name: found[name] for name in CHANGES if found[name]}

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints; `bytes_out_copied` leaves out what has to be computed first."""
        ready = [
            item
            for task in self.tasks
            if not task.ranked
            for item in task.ready or ()
            if isinstance(item, Copied)
        ]
        return {
            "output": str(self.output),
            "family": self.adapter.family.name,
            "from": self.adapter.format.name,
            "to": self.keys.format.name,
            "modules": len(self.tasks),
            **self.counts(),
            "bytes_in": sum(adapter.source.size for adapter in self.adapters),
            "bytes_out_copied": sum(self.nbytes(item) for item in (*ready, *self.carried)),
            "peak_memory": peak_memory(self.steps, self.options.memory),
            "notes": list(self.notes),
            "unused": [item.to_dict() for item in self.unused],
            "details": [detail(task, 0.0, task.entries[0].facts.rank) for task in self.tasks],
        }

    def nbytes(self, item: Copied) -> int:
        """Bytes of a tensor that is copied."""
        return self.adapters[item.number].source.infos[item.source].nbytes

    def close(self) -> None:
        """Close the inputs."""
        for adapter in self.adapters:
            adapter.close()
        if self.base is not None:
            self.base.close()


@dataclass(frozen=True)
class Mixing:
    """How several ΔW become one, entry by entry: `method` ties | dare | dare-ties | magnitude, the share of entries that
    is kept, and the seed of what is dropped."""

    method: str
    density: float
    seed: int


def detail(task: Task, error: float | None, rank: int | None) -> dict[str, Any]:
    """The record of one module."""
    return {
        "module": task.label,
        "algorithm": task.kind.name,
        "rank": rank,
        "change": ", ".join(name for name in CHANGES if name in task.changes) or "renamed",
        "relative_error": error,
    }


def open_all(paths: Sequence[Path], options: RecastOptions) -> tuple[Adapter, ...]:
    """Adapters of one family: a look-alike follows the first. ShapeMismatch where they are of two."""
    found: list[Adapter] = []
    try:
        for path in paths:
            adapter = Adapter.open(path, family=options.family, format=options.format)
            if found and adapter.family is not found[0].family:
                adapter = _alike(found[0], adapter)
            found.append(adapter)
    except AdaptkitError:
        for adapter in found:
            adapter.close()
        raise
    return tuple(found)


def _alike(first: Adapter, other: Adapter) -> Adapter:
    """`other` read as of the first one's family, where its names allow that."""
    path = other.source.path
    if first.family.name in other.detection.alternatives:
        other.close()
        return Adapter.open(path, family=first.family.name)
    if not first.known and not other.known:
        return other
    other.close()
    raise ShapeMismatch(
        f"this adapter is for {other.family.title}, the first one for {first.family.title}",
        hint="only adapters of one family can be put together; see `adaptkit inspect`",
        file=path,
    )


def recast(
    command: str,
    adapters: tuple[Adapter, ...],
    into: Into,
    output: Path,
    options: RecastOptions,
    *,
    weights: Sequence[float] = (1.0,),
    policy: Policy | None = None,
    mixing: Mixing | None = None,
    notes: Sequence[str] = (),
) -> Recast:
    """Find the place of every module in the new format; reads headers only, and fails here if anything can."""
    stored_dtype(options.dtype, "F32")
    if options.algo is not None:
        chosen("algorithm", algorithms(), options.algo)
    check_adapter_output(output, folder=into.config, overwrite=options.overwrite)
    first, path = adapters[0], adapters[0].source.path
    keys = _keys(first, into.format)
    base = None if options.base is None else _base(options.base, first)
    planner = _Planner(adapters, weights, keys, into, options, policy, mixing, base)
    tasks = planner.tasks()
    refuse_unused(planner.unused, options.allow_unused, path)
    if not tasks:
        raise NothingToDo(
            f"no module of this adapter is left to {command}",
            hint="see --only and --skip",
            file=path,
        )
    _check_family(first, into.format, tasks, options)
    steps = tuple(_step(task) for task in tasks if task.ready is None or task.ranked)
    check_memory(steps, options.memory)
    return Recast(
        command,
        adapters,
        tuple(weights),
        keys,
        options,
        output,
        tasks,
        planner.carried,
        tuple(planner.unused),
        steps,
        base,
        policy,
        mixing,
        (*notes, *planner.notes),
    )


def _base(path: Path, adapter: Adapter) -> Checkpoint:
    found = Checkpoint.open(path, family=adapter.family.name if adapter.known else None)
    if adapter.known and found.family is not adapter.family:
        found.close()
        raise ShapeMismatch(
            f"the base is {found.family.title}, the adapter is for {adapter.family.title}",
            file=path,
        )
    return found


def _keys(adapter: Adapter, format: str) -> KeyMap:
    return (
        compile_keys(adapter.family.name, format)
        if adapter.known
        else KeyMap(adapter.family, formats()[format])
    )


def _check_family(
    adapter: Adapter, format: str, tasks: Sequence[Task], options: RecastOptions
) -> None:
    """AmbiguousAdapter where a look-alike family would give other names."""
    if options.family is not None or format == adapter.format.name:
        return
    keys = _keys(adapter, format)
    ours = [keys.stem(task.slot) for task in tasks]
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


def _spec(adapter: Adapter, name: str) -> TensorSpec:
    info = adapter.source.infos[name]
    return TensorSpec(name, info.dtype, info.shape)


def _step(task: Task) -> Step[Task]:
    """Working memory of a slot: what is read, and what is computed from it in float32 and float64 and rounded."""
    adapter = task.terms[0].job.adapter
    elements = dense = 0
    for term in task.terms:
        infos = term.job.adapter.source.infos
        fused = len(term.job.parts) if len(term.job.parts) > 1 else 1
        elements += fused * sum(
            infos[key].numel for entry in term.job.entries for _, key in entry.tensors()
        )
        dense = max(dense, sum(e.facts.rows * e.facts.columns for e in term.job.entries))
    whole = "changed" in task.changes or task.kind.name == "full" or task.base is not None
    order = adapter.source.order(next(task.entries[0].tensors())[1])
    shape = id(task) if task.likeness is None else task.likeness
    return Step(task, shape, 16 * elements + (16 * dense if whole else 0), order)


def _likeness(task: Task, swapped: bool) -> Hashable:
    """Everything that two tasks must share to be computed as one stack: here only modules of one piece that are cut by rank."""
    whole = task.terms[0].job.whole
    if not task.ranked or task.base is not None or "summed" in task.changes or whole is None:
        return None
    thin = product_rank(task.terms[0]) <= THIN * min(whole.facts.rows, whole.facts.columns)
    if not (task.kind.stacks and whole.kind.stacks and thin):
        return None
    infos = task.terms[0].job.adapter.source.infos
    tensors = tuple((role, infos[key].shape, infos[key].dtype) for role, key in whole.tensors())
    return task.kind, whole.kind, whole.facts, whole.swapped, swapped, task.changes, tensors


class _Planner:
    """Makes a task of every slot; what would be lost goes to `unused`."""

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        weights: Sequence[float],
        keys: KeyMap,
        into: Into,
        options: RecastOptions,
        policy: Policy | None,
        mixing: Mixing | None,
        base: Checkpoint | None,
    ) -> None:
        self.adapters, self.weights, self.keys, self.into = adapters, weights, keys, into
        self.options, self.policy, self.mixing, self.base = options, policy, mixing, base
        self.held = {} if base is None else base.targets()
        self.notes: list[str] = []
        self.unused = [
            Unused(key, _why(one, key, why))
            for one in adapters
            for key, why in one.unclaimed.items()
        ]
        self.carried = tuple(self._carried())

    def _carried(self) -> Iterator[Copied]:
        """What stands beside the weights of each adapter, once."""
        taken: set[str] = set()
        for number, adapter in enumerate(self.adapters):
            for name in adapter.carried:
                if name in taken:
                    self.unused.append(
                        Unused(
                            name, f"{adapter.source.path.name}: another input has one of this name"
                        )
                    )
                else:
                    taken.add(name)
                    yield Copied(name, name, _spec(adapter, name), number)

    def tasks(self) -> tuple[Task, ...]:
        terms: dict[Slot, list[Term]] = {}
        for number, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True)):
            respelling = Respelling(adapter, self.keys)
            for job in respelling.jobs(self._entries(adapter)):
                terms.setdefault(job.slot, []).append(Term(job, weight, number))
            self.unused += [Unused(key, why) for key, why in respelling.lost.items()]
        return tuple(self._task(slot, tuple(found)) for slot, found in terms.items())

    def _entries(self, adapter: Adapter) -> Mapping[Slot, Entry]:
        if not (self.options.only or self.options.skip):
            return adapter.entries
        label = adapter.label
        return {
            s: e
            for s, e in adapter.entries.items()
            if selected(label(s), s.component, self.options)
        }

    def _task(self, slot: Slot, terms: tuple[Term, ...]) -> Task:
        task = Task(slot, terms, terms[0].job.entries[0].kind, None)
        try:
            kind = self._kind(task)
            ranked = self.policy is not None and self._ranked(task, kind)
            changes = frozenset(self._what(task, kind))
            based = self._place(task, kind)
        except AdaptkitError as error:
            raise error.at(file=terms[0].job.adapter.source.path, tensor=task.label) from None
        ready = self._ready(terms[0], kind) if changes <= {"renamed"} else None
        if ranked:
            changes |= {"resized"}
        task = replace(task, kind=kind, ready=ready, changes=changes, ranked=ranked, base=based)
        return replace(task, likeness=_likeness(task, self.keys.swapped(slot))) if ranked else task

    # which algorithm ------------------------------------------------------------------------------------------------

    def _kind(self, task: Task) -> type[Weights]:
        """The algorithm of the output; vectors stay full differences."""
        kinds = {entry.kind for entry in task.entries}
        if any(entry.facts.vector for entry in task.entries):
            return next(iter(kinds))
        if self.options.algo is not None:
            return self._asked(algorithms()[self.options.algo], kinds)
        if len(task.terms) > 1 or self.mixing is not None:
            return self._sum(task, kinds)
        if len(kinds) > 1:
            names = " and ".join(sorted(kind.name for kind in kinds))
            raise NotRepresentable(
                f"its parts are {names}, which cannot be fused as they are",
                hint="convert with --algo lora or --algo full",
            )
        (kind,) = kinds
        if self.policy is not None and kind.resized is not None:
            return algorithms()[kind.resized]
        return kind

    def _asked(self, wanted: type[Weights], kinds: set[type[Weights]]) -> type[Weights]:
        """`--algo`: a DoRA that is only resized keeps its magnitudes; without a base it has no other form."""
        if len(kinds) == 1 and self.base is None:
            (kind,) = kinds
            dora = f"{wanted.name}+dora"
            if kind.name.endswith("+dora") and self.policy is not None and dora in algorithms():
                return algorithms()[dora]
        return wanted

    def _sum(self, task: Task, kinds: set[type[Weights]]) -> type[Weights]:
        """Of a sum: of LoRAs a LoRA of all ranks together; else that, or the full difference where it is smaller."""
        if self.policy is not None:
            return algorithms()["lora"]
        if self.mixing is not None or any(
            kind.name == "full" or not kind.additive for kind in kinds
        ):
            return algorithms()["full"]
        rank = sum(product_rank(term) for term in task.terms)
        facts = task.entries[0].facts
        rows = sum(entry.facts.rows for entry in task.terms[0].job.entries)
        lora = {kind.name for kind in kinds} == {"lora"} or rank * (
            rows + facts.columns
        ) < rows * facts.columns
        return algorithms()["lora" if lora else "full"]

    def _ranked(self, task: Task, kind: type[Weights]) -> bool:
        """Whether the policy has a rank to choose here."""
        if any(entry.facts.vector for entry in task.entries):
            return False
        return kind.resized is not None and kind.name != "full"

    def _place(self, task: Task, kind: type[Weights]) -> tuple[Piece, ...] | None:
        """Where the slot lies in the base, for terms that have no difference of their own; NotRepresentable without one."""
        dependent = [entry for entry in task.entries if not entry.kind.additive]
        alone = len(task.terms) == 1 and self.mixing is None and task.terms[0].weight == 1.0
        if not dependent or (
            alone and all(entry.kind is kind or _turned(entry.kind, kind) for entry in dependent)
        ):
            return None if self.base is None or not dependent else self._located(task)
        if self.base is None:
            name = dependent[0].kind.name
            raise NotRepresentable(
                f"what a {name} changes depends on the weight it is applied to",
                hint="give that checkpoint with --base",
            )
        return self._located(task)

    def _located(self, task: Task) -> tuple[Piece, ...]:
        assert self.base is not None
        pieces = self.base.locate(task.slot, self.held.get(task.slot.target, {}))
        if pieces is None:
            raise NotRepresentable(
                f"the base checkpoint has no {task.label}", hint="is it the right --base?"
            )
        return pieces

    # what is done to it ---------------------------------------------------------------------------------------------

    def _what(self, task: Task, kind: type[Weights]) -> Iterator[str]:
        for term in task.terms:
            yield from self._what_of(term, kind)
        if len(task.terms) > 1 or self.mixing is not None:
            yield "summed"

    def _what_of(self, term: Term, kind: type[Weights]) -> Iterator[str]:
        job, entries = term.job, term.job.entries
        if len(job.parts) > 1:
            yield "fused"
        elif job.whole is None:
            yield "split"
        if any(e.swapped for e in entries) != self.keys.swapped(job.slot):
            yield "swapped"
        if any(e.kind is not kind for e in entries):
            yield "changed"
        if term.weight != 1.0:
            yield "scaled"
        if any(self._folds(e) for e in entries):
            yield "folded"
        infos = job.adapter.source.infos
        if self.options.dtype != "keep" and any(
            self._casts(infos[key].dtype) for e in entries for _, key in e.tensors()
        ):
            yield "cast"

    def _casts(self, dtype: str) -> bool:
        return dtype in FLOATS and stored_dtype(self.options.dtype, dtype) != dtype

    def _folds(self, entry: Entry) -> bool:
        """Whether the scale has to go into the weights: no place for alpha, or none that a reader takes as a scale."""
        if entry.facts.scale == 1.0 or entry.kind.bounded:
            return False
        return self.into.fold or (entry.facts.rank is None and ALPHA in entry.kind.roles)

    def _ready(self, term: Term, kind: type[Weights]) -> tuple[Copied | Written, ...]:
        job, entry = term.job, term.job.whole
        assert entry is not None
        spell = self.keys.spell
        found: list[Copied | Written] = []
        for role, key in entry.keys.items():
            if role != ALPHA:
                info = job.adapter.source.infos[key]
                shape = self._shape(job, entry, role, info.shape)
                name = spell(job.slot, kind.name, kind.stored_as(role, peft=self.keys.format.peft))
                found.append(Copied(name, key, TensorSpec(name, info.dtype, shape), term.number))
        alpha = self._alpha(term, entry)
        return tuple(found) if alpha is None else (*found, alpha)

    def _shape(self, job: Job, entry: Entry, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape in the new format: PEFT and LyCORIS lay DoRA's magnitudes out differently."""
        try:
            return entry.kind.laid_out(role, shape, entry.facts, peft=self.keys.format.peft)
        except NotRepresentable as error:
            raise error.at(file=job.adapter.source.path, tensor=entry.keys[role]) from None

    def _alpha(self, term: Term, entry: Entry) -> Copied | Written | None:
        """What the new format says of alpha: the stored tensor, one of our own, or nothing."""
        if ALPHA not in entry.kind.roles or self._silent(entry):
            return None
        name = self.keys.spell(term.job.slot, entry.kind.name, ALPHA)
        stored, rank = entry.keys.get(ALPHA), entry.facts.rank
        placeholder = (
            rank is None and not entry.kind.bounded and not abs(entry.alpha or math.inf) <= SANE
        )
        if stored is not None and not placeholder:
            return Copied(
                name, stored, _spec(term.job.adapter, stored)._replace(name=name), term.number
            )
        return Written(name, 1.0 if rank is None else entry.facts.scale * rank)

    def _silent(self, entry: Entry) -> bool:
        """Whether the new format says nothing of this entry's alpha."""
        if entry.kind.bounded:  # alpha is no scale but a bound, and part of the weights
            return ALPHA not in entry.keys
        place = self.keys.format.alpha
        if self.into.fold or place in (Alpha.NONE, Alpha.CONFIG):
            return True
        return place is Alpha.OPTIONAL and entry.facts.scale == 1.0


def _turned(kind: type[Weights], into: type[Weights]) -> bool:
    """Whether a resized `kind` is an `into`: magnitudes stay, the direction changes."""
    return kind.resized == into.name


def product_rank(term: Term) -> int:
    """The rank of the exact factors of what a term gives: parts that are fused add up."""
    infos = term.job.adapter.source.infos
    total = 0
    for entry in term.job.entries:
        shapes = {role: infos[key].shape for role, key in entry.tensors()}
        total += entry.kind.product_rank(shapes, entry.facts)
    return total


def _why(adapter: Adapter, key: str, reason: str) -> str:
    """The reason, and the nearest name that the tables know."""
    from adaptkit.suggest import nearest

    near = nearest(adapter.keys, key) if reason.startswith("no such") else None
    return reason if near is None else f"{reason}; the nearest known name is {near}"
