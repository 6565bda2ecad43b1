"""Decide what becomes of every module when an adapter is rewritten; headers only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import chosen
from adaptkit.entries import shared_name
from adaptkit.errors import (
    AdaptkitError,
    NothingToDo,
    NotRepresentable,
    ShapeMismatch,
)
from adaptkit.files.header import TensorSpec
from adaptkit.files.quantized import FP8
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import KeyMap, algorithms
from adaptkit.keymap.kinds import dense_kind, low_rank_kind, wrapped_like
from adaptkit.ops.adapter_file.writer import check_adapter_output
from adaptkit.ops.block_weights import Blocks
from adaptkit.ops.rewrite.checks import (
    bias_notes,
    check_base,
    check_biases,
    check_family,
    check_layout,
    check_names,
    check_shared,
    check_sizes,
    keys_of,
    scales_biases,
)
from adaptkit.ops.rewrite.plan import (
    Copied,
    Dropped,
    Into,
    Mixing,
    Recast,
    RecastOptions,
    Task,
    Term,
    Written,
    chosen_entries,
    product_rank,
)
from adaptkit.ops.rewrite.stacking import likeness_of, step_of
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import FLOATS, Unused, refuse_unused, stored_dtype
from adaptkit.respelling import Assembly, Respelling, placed
from adaptkit.steps import check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Piece
    from adaptkit.entries import Entry
    from adaptkit.names import Slot
    from adaptkit.ops.ranks.rules.contract import Policy

__all__ = ["open_base", "recast"]


SANE = 1e4  # a larger alpha that scales nothing is a placeholder: ai-toolkit writes 9999999999


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
    """Find the place of every module in the new format.

    Reads headers only. Anything that can fail fails here.
    """
    stored_dtype(options.dtype, "F32")
    if options.algo is not None:
        chosen("algorithm", algorithms(), options.algo)
    check_adapter_output(output, folder=into.config, overwrite=options.overwrite)
    first, path = adapters[0], adapters[0].source.path
    base = None if options.base is None else open_base(options.base, first)
    if base is not None:
        adapters = tuple(base.adapted(adapter) for adapter in adapters)
    keys = keys_of(adapters, into.format, into.dialect)
    planner = _Planner(adapters, weights, keys, into, options, policy, mixing, base)
    tasks = planner.tasks()
    planner.selection.check("this adapter" if len(adapters) == 1 else "these adapters")
    if not tasks:
        check_names(first, planner.unused, keys)
    refuse_unused(planner.unused, options.allow_unused, path, planner.held_parts(tasks))
    if not tasks:
        raise NothingToDo(
            f"no module of this adapter is left to {command}",
            hint="see --only and --skip",
            file=path,
        )
    check_family(first, into.format, tasks, options)
    check_biases(keys, tasks)
    check_shared(tasks)
    steps = tuple(
        step_of(task, options, base, mixed=mixing is not None)
        for task in tasks
        if task.ready is None or task.ranked
    )
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
        (*notes, *planner.notes, *bias_notes(tasks)),
        tuple(planner.dropped),
        planner.selection.left_out,
    )


def open_base(path: Path, adapter: Adapter) -> Checkpoint:
    """Open the checkpoint that an adapter is for; ShapeMismatch if it is of another family."""
    family = adapter.family.name if adapter.known else None
    found = Checkpoint.open(path, family=family, strangers=not adapter.known)
    if adapter.known and found.family.name != adapter.family.name:
        found.close()
        raise ShapeMismatch(
            f"the base is {found.family.title}, the adapter is for {adapter.family.title}",
            file=path,
        )
    return found


def _spec(adapter: Adapter, name: str) -> TensorSpec:
    info = adapter.source.infos[name]
    return TensorSpec(name, info.dtype, info.shape)


class _Planner:
    """Make a task of every slot; keys that would be lost go to `unused`."""

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
        self.adapters, self.weights, self.keys = adapters, weights, keys
        self.into = replace(into, fold=into.fold or scales_biases(adapters, keys))
        self.options, self.policy, self.mixing, self.base = options, policy, mixing, base
        self.blocks = Blocks(options.blocks, keys.family)
        self.held = {} if base is None else base.targets()
        self.selection = Selection(options.only, options.skip, adapters[0].family)
        self.notes: list[str] = []
        self.dropped: list[Dropped] = []
        self.unused = [
            Unused(key, _why(one, key, why))
            for one in adapters
            for key, why in one.unclaimed.items()
        ]
        self.carried = tuple(self._carried())

    def _carried(self) -> Iterator[Copied]:
        """The tensors that other tools left beside the weights, each name once."""
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
            for job in respelling.jobs(placed(chosen_entries(adapter, self.selection), self.keys)):
                factor = self.blocks.weight(job.slot)
                if factor != 0.0:
                    terms.setdefault(job.slot, []).append(Term(job, weight * factor, number))
            self.unused += [Unused(key, why) for key, why in respelling.lost.items()]
            self.dropped += [Dropped(adapter, entry, weight) for entry in respelling.dropped]
        self.blocks.check()
        self.notes += self.blocks.notes()
        numbered = enumerate(terms.items())
        return tuple(self._task(n, slot, tuple(found)) for n, (slot, found) in numbered)

    def _task(self, number: int, slot: Slot, terms: tuple[Term, ...]) -> Task:
        task = Task(slot, terms, terms[0].job.entries[0].kind, None, number=number)
        check_sizes(task)
        try:
            kind = self._kind(task)
            ranked = self.policy is not None and self._ranked(task, kind)
            changes = frozenset(self._what(task, kind))
            based = self._place(task, kind)
            if not ranked or kind.peft_only:
                check_layout(task, kind, self.keys)
            ready = self._ready(terms[0], kind) if changes <= {"renamed"} else None
        except AdaptkitError as error:
            raise error.at(file=terms[0].job.adapter.source.path, tensor=task.label) from None
        if ranked:
            changes |= {"resized"}
        task = replace(task, kind=kind, ready=ready, changes=changes, ranked=ranked, base=based)
        return (
            replace(task, likeness=likeness_of(task, self.keys.swapped(slot))) if ranked else task
        )

    def held_parts(self, tasks: Sequence[Task]) -> str | None:
        """The way out where the format holds some parts of the model, and others not at all."""
        held = {task.slot.component for task in tasks}
        lost = {one.entry.slot.component for one in self.dropped}
        if not lost or not held or held & lost:
            return None
        only = " ".join(f"--only {name}" for name in sorted(held))
        return f"{self.keys.format.name} keys hold {' and '.join(sorted(held))} alone: {only}"

    # --- which algorithm ---------------------------------------------------------------------

    def _kind(self, task: Task) -> type[Weights]:
        """The algorithm of the output; vectors keep theirs."""
        kinds = {entry.kind for entry in task.entries}
        if any(entry.facts.vector for entry in task.entries):
            return next(iter(kinds))
        if self.options.algo is not None:
            return self._asked(algorithms()[self.options.algo], kinds)
        # half of a DoRA is no DoRA: with the base it is a difference
        scaled = any(term.weight != 1.0 for term in task.terms)
        if (
            len(task.terms) > 1
            or self.mixing is not None
            or (scaled and not all(kind.additive or kind.linear for kind in kinds))
        ):
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
        """The algorithm that `--algo` means.

        A DoRA that is only resized keeps its magnitudes: without a base it has no other form.
        """
        if len(kinds) == 1 and self.base is None and self.policy is not None:
            return wrapped_like(next(iter(kinds)), wanted) or wanted
        return wanted

    def _sum(self, task: Task, kinds: set[type[Weights]]) -> type[Weights]:
        """The algorithm of a sum: products whose ranks add up, or a dense difference.

        Products stay products. Other kinds become what is smaller.
        """
        if self.policy is not None:
            return low_rank_kind()
        if self.mixing is not None or any(kind.dense or not kind.additive for kind in kinds):
            return dense_kind()
        rank = sum(product_rank(term) for term in task.terms)
        facts = task.entries[0].facts
        rows = sum(entry.facts.rows for entry in task.terms[0].job.entries)
        smaller = rank * (rows + facts.columns) < rows * facts.columns
        if smaller or all(kind.low_rank for kind in kinds):
            return low_rank_kind()
        return dense_kind()

    def _ranked(self, task: Task, kind: type[Weights]) -> bool:
        """Whether the policy has a rank to choose here.

        NotRepresentable if its promise would depend on the base weight.
        """
        if any(entry.facts.vector for entry in task.entries):
            return False
        if kind.resized is None or kind.dense:
            return False
        if not kind.additive and self.policy is not None and self.policy.most_error is not None:
            raise NotRepresentable(
                f"--error cannot hold for a {kind.name}, whose change depends on the base weight",
                hint="use --rank, --energy or --size; or make it a LoRA: --algo lora and --base",
            )
        return True

    def _place(self, task: Task, kind: type[Weights]) -> tuple[Piece, ...] | None:
        """The place of the slot in the base, for terms whose ΔW depends on it.

        NotRepresentable without a base.
        """
        dependent = [entry for entry in task.entries if not entry.kind.additive]
        alone = len(task.terms) == 1 and self.mixing is None
        alone = alone and (kind.linear or task.terms[0].weight == 1.0)
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
        check_base(task, self.base, pieces)
        return pieces

    # --- what is done to it ------------------------------------------------------------------

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
        if any(e.kind is not kind or self._unrolls(e) for e in entries):
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

    def _unrolls(self, entry: Entry) -> bool:
        return self.keys.format.peft and not entry.kind.cores.isdisjoint(entry.keys)

    def _casts(self, dtype: str) -> bool:
        return dtype in (*FLOATS, *FP8) and stored_dtype(self.options.dtype, dtype) != dtype

    def _folds(self, entry: Entry) -> bool:
        """Whether the scale is folded into the weights.

        It is if the format has no place for alpha, or readers do not take alpha as a scale.
        """
        if entry.facts.scale == 1.0 or entry.kind.bounded or entry.kind.peft_only:
            return False
        return self.into.fold or entry.facts.rank is None

    def _ready(self, term: Term, kind: type[Weights]) -> tuple[Copied | Written, ...]:
        job, entry = term.job, term.job.whole
        assert entry is not None
        spell = self.keys.spell
        found: list[Copied | Written] = []
        for role, key in entry.keys.items():
            if role in kind.shared:
                name = shared_name(kind, role)
                spec = _spec(job.adapter, key)._replace(name=name)
                found.append(Copied(name, key, spec, term.number))
            elif role != ALPHA:
                info = job.adapter.source.infos[key]
                shape = self._shape(job, entry, role, info.shape)
                name = spell(job.slot, kind.name, kind.stored_as(role, peft=self.keys.format.peft))
                shape = self.keys.flat(name, shape)
                found.append(Copied(name, key, TensorSpec(name, info.dtype, shape), term.number))
        alpha = self._alpha(term, entry)
        return tuple(found) if alpha is None else (*found, alpha)

    def _shape(
        self, job: Assembly, entry: Entry, role: str, shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The stored shape in the new format: PEFT lays out DoRA magnitudes differently."""
        try:
            return entry.kind.laid_out(role, shape, entry.facts, peft=self.keys.format.peft)
        except NotRepresentable as error:
            raise error.at(file=job.adapter.source.path, tensor=entry.keys[role]) from None

    def _alpha(self, term: Term, entry: Entry) -> Copied | Written | None:
        """The alpha tensor of the new format: copied, written anew, or none."""
        if ALPHA not in entry.kind.roles or self._silent(entry):
            return None
        name = self.keys.spell(term.job.slot, entry.kind.name, ALPHA)
        stored, rank = entry.keys.get(ALPHA), entry.facts.rank
        placeholder = (
            rank is None and not entry.kind.bounded and not abs(entry.alpha or math.inf) <= SANE
        )
        if stored is not None and not placeholder and entry.alpha_source != "given":
            return Copied(
                name, stored, _spec(term.job.adapter, stored)._replace(name=name), term.number
            )
        return Written(name, 1.0 if rank is None else entry.facts.scale * rank)

    def _silent(self, entry: Entry) -> bool:
        """Whether the new format stores no alpha for this entry."""
        if entry.kind.bounded:  # alpha is not a scale but a bound, and one of the weights
            return ALPHA not in entry.keys
        place = self.keys.format.alpha
        if self.into.fold or place in (Alpha.NONE, Alpha.CONFIG):
            return True
        return place is Alpha.OPTIONAL and entry.facts.scale == 1.0


def _turned(kind: type[Weights], into: type[Weights]) -> bool:
    """Whether a resized `kind` is an `into`: magnitudes stay, directions change."""
    return kind.resized == into.name


def _why(adapter: Adapter, key: str, reason: str) -> str:
    """The reason with the nearest name that the tables know."""
    near = adapter.nearest(key)
    return reason if near is None else f"{reason}; the nearest known name is {near}"
