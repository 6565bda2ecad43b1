"""Compute the tensors of one module, and measure the error of what is written."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adaptkit.algorithms._exchanged import with_halves_exchanged
from adaptkit.algorithms.contract import ALPHA, THIN, FitSpec
from adaptkit.checkpoint import exchanged
from adaptkit.errors import NonFinite, NotRepresentable
from adaptkit.files.tensors import finite
from adaptkit.formats.contract import Alpha
from adaptkit.keymap.kinds import changed, dense_kind, low_rank_kind
from adaptkit.meaning import as_read
from adaptkit.ops.ranks.options import largest
from adaptkit.ops.rewrite.joining import differences, joined
from adaptkit.ops.rewrite.plan import Task, product_rank
from adaptkit.ops.rewrite.rounding import (
    RoundedStack,
    lost,
    round_all,
    round_stack,
    vanished,
)
from adaptkit.ops.rewrite.state import Cut, State, Stored, curve_of, dtype_of, named, stays
from adaptkit.ops.shared import torch_dtype
from adaptkit.staging.lanes import Later, back

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Decomposition, Facts, Weights
    from adaptkit.ops.rewrite.plan import Recast, Term

__all__ = ["Rewriter"]

OVERFLOWS = "ΔW overflows: its numbers are too large to compute with"
CANCELLED = 1e-14  # of Σ ‖·‖² of the terms: the rounding of float64 in a sum that is zero


class Rewriter:
    """Compute tasks: read, decompose, cut, round, measure."""

    def __init__(self, plan: Recast, state: State) -> None:
        self.plan, self.state = plan, state

    def load(self, task: Task) -> dict[str, Tensor]:
        """Read every tensor of every term, and the base weight if it is needed."""
        found: dict[str, Tensor] = {}
        for number, term in enumerate(task.terms):
            for n, entry in enumerate(term.job.entries):
                tensors = term.job.adapter.read(entry)
                found |= {f"{number}.{n}/{role}": tensor for role, tensor in tensors.items()}
        if task.base is not None and self.plan.base is not None:
            found["base"] = self.plan.base.read(task.base)
        return found

    def first(
        self, tasks: Sequence[Task], tensors: dict[str, Tensor]
    ) -> Sequence[Stored | Decomposition | Cut | Later[Cut]]:
        """Decompose tasks whose rank is chosen, and store all others.

        A rank that depends on no other task is cut at once.
        """
        found = self._stacked(self._first_stack, tasks, tensors)
        return found or [
            self._guarded(self._first, task, tensors, n) for n, task in enumerate(tasks)
        ]

    def second(
        self, tasks: Sequence[Task], tensors: dict[str, Tensor]
    ) -> Sequence[Stored | Later[Stored]]:
        """Cut tasks to the ranks chosen."""
        found = self._stacked(self._second_stack, tasks, tensors)
        return found or [
            self._guarded(self._second, task, tensors, n) for n, task in enumerate(tasks)
        ]

    def _stacked(self, work: Any, tasks: Sequence[Task], tensors: Mapping[str, Tensor]) -> Any:
        """The results of a stack of tasks; None if they must be computed one by one.

        Only that names the task at fault.
        """
        from torch.linalg import LinAlgError  # type: ignore[attr-defined]

        from adaptkit.linalg.precision import works_on_stacks

        if tasks[0].likeness is None:
            return None
        # an accelerator would wait for each answer, and the host sees it in the Gram matrices
        quick = works_on_stacks(next(iter(tensors.values())).device)
        if not (quick or all(map(finite, tensors.values()))):
            return None
        try:
            return work(tasks, tensors)
        except (NonFinite, NotRepresentable, LinAlgError):  # LAPACK does not converge
            return None

    def _guarded(self, work: Any, task: Task, tensors: Mapping[str, Tensor], n: int) -> Any:
        from torch.linalg import LinAlgError  # type: ignore[attr-defined]

        own = {name: tensor[n] for name, tensor in tensors.items()}
        path = task.terms[0].job.adapter.source.path
        try:
            # before any decomposition: what LAPACK makes of NaN differs from machine to machine
            _finite(task, own)
            return work(task, own)
        except (NotRepresentable, NonFinite) as error:
            raise error.at(file=path, tensor=task.label) from None
        except LinAlgError:
            raise NonFinite(OVERFLOWS, file=path, tensor=task.label) from None

    def _first(self, task: Task, tensors: Mapping[str, Tensor]) -> Stored | Decomposition | Cut:
        exact = self._exact(task, tensors)
        if len(task.terms) > 1 and exact.additive and self._cancel(task, exact, tensors):
            return self._nothing(task, exact)
        if task.ranked:
            exact = exact.widened()
            decomposed = self._decomposed(task, exact)
            return (
                self._cut(task, exact, decomposed, tensors)
                if self.plan.policy and self.plan.policy.local
                else decomposed
            )
        whole = exact if isinstance(exact, task.kind) else self._changed(task, exact)
        found = self._store(task, exact if whole.additive else whole, whole, tensors)
        if found.norm is not None and not math.isfinite(found.norm):
            raise NonFinite(OVERFLOWS)
        return found

    def _first_stack(
        self, tasks: Sequence[Task], tensors: Mapping[str, Tensor]
    ) -> Sequence[Decomposition | Cut | Later[Cut]]:
        exact, policy = self._exact(tasks[0], tensors).computed(), self.plan.policy
        found = tasks[0].kind.decompose_stack(exact, self._spec(tasks[0]))
        if not all(math.isfinite(one.norm) for one in found):
            raise NonFinite(OVERFLOWS)
        if policy is None or not policy.local:
            return found
        pairs = list(zip(tasks, found, strict=True))
        ranks = policy.choose([curve_of(self.plan, task, one) for task, one in pairs])
        stay = [
            rank == 0 or stays(self.state, task, one, rank)
            for (task, one), rank in zip(pairs, ranks, strict=True)
        ]
        stored: Sequence[Stored | Later[Stored] | None] = [None] * len(tasks)
        if not all(stay):
            stored = self._store_stack(tasks, exact, found, ranks)
        cuts = zip(found, ranks, stored, stay, strict=True)
        return [_cut(one.lighter(), rank, None if same else kept) for one, rank, kept, same in cuts]

    def _decomposed(self, task: Task, exact: Weights) -> Decomposition:
        found = task.kind.decompose(exact, self._spec(task))
        if not math.isfinite(found.norm):
            raise NonFinite(OVERFLOWS)
        return found

    def _cut(
        self, task: Task, exact: Weights, found: Decomposition, tensors: Mapping[str, Tensor]
    ) -> Cut:
        assert self.plan.policy is not None
        (rank,) = self.plan.policy.choose([curve_of(self.plan, task, found)])
        stored = None
        if rank > 0 and not stays(self.state, task, found, rank):
            stored = self._store(task, exact, found.keep(exact, rank), tensors, found)
        return Cut(found.lighter(), rank, stored)

    def _cancel(self, task: Task, exact: Weights, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the terms of a sum cancel up to rounding."""
        parts = (self._term(task, number, term, tensors) for number, term in enumerate(task.terms))
        return exact.norm_squared() <= CANCELLED * sum(part.norm_squared() for part in parts)

    def _nothing(self, task: Task, exact: Weights) -> Stored:
        """A ΔW of zero, in the smallest form."""
        if any(entry.facts.vector for entry in task.entries) or task.kernel is None:
            return replace(self._store(task, exact, exact.times(0.0), {}), zero=True)
        smallest = low_rank_kind().fit(exact.delta() * 0.0, FitSpec(1, task.kernel))
        return replace(self._store(task, smallest, smallest, {}), zero=True)

    def _changed(self, task: Task, weights: Weights) -> Weights:
        """The weights in another algorithm: exactly if possible, else the nearest."""
        try:
            return task.kind.exactly(weights, task.kernel)
        except NotRepresentable:
            if not task.kind.extractable or not weights.additive:
                raise
            return task.kind.fit(weights.delta(), self._spec(task))

    def _second(self, task: Task, tensors: Mapping[str, Tensor]) -> Stored:
        exact, found = self._exact(task, tensors), self.state.decomposed[task.number]
        kept = found.keep(exact, self.state.ranks[task.number])
        return self._store(task, exact.widened(), kept, tensors, found)

    def _second_stack(
        self, tasks: Sequence[Task], tensors: Mapping[str, Tensor]
    ) -> Sequence[Stored | Later[Stored]]:
        exact = self._exact(tasks[0], tensors).computed()
        found = [self.state.decomposed[task.number] for task in tasks]
        ranks = [self.state.ranks[task.number] for task in tasks]
        return self._store_stack(tasks, exact, found, ranks)

    def _spec(self, task: Task) -> FitSpec:
        options = self.plan.options
        if task.kernel is None:
            raise NotRepresentable("the stored shapes do not tell the kernel size of this layer")
        rank = largest(options, convolution=task.convolution)
        return FitSpec(rank, task.kernel, options.factor)

    # --- the exact weights -------------------------------------------------------------------

    def _exact(self, task: Task, tensors: Mapping[str, Tensor]) -> Weights:
        """All terms together, not rounded, in the order of rows of the new format."""
        whole = self.meant(task, tensors)
        swapped = self.plan.keys.swapped(task.slot)
        return with_halves_exchanged(whole) if swapped else whole

    def meant(self, task: Task, tensors: Mapping[str, Tensor]) -> Weights:
        """All terms together, not rounded, in the order of rows of the model."""
        if self.plan.mixing is not None:
            _finite(task, tensors)  # electing signs would drop NaN without a word
        parts = [self._term(task, number, term, tensors) for number, term in enumerate(task.terms)]
        if len(parts) == 1 and self.plan.mixing is None:
            return parts[0]
        return self._together(task, parts)

    def _together(self, task: Task, parts: Sequence[Weights]) -> Weights:
        vector = any(entry.facts.vector for entry in task.entries)
        if self.plan.mixing is not None:
            return self._mixed(task, parts)
        if vector:
            return type(parts[0]).sum(parts)
        kind = dense_kind() if task.kind.dense or self._thick(task, parts) else low_rank_kind()
        return kind.sum(
            [part if type(part) is kind else kind.exactly(part, task.kernel) for part in parts]
        )

    def _thick(self, task: Task, parts: Sequence[Weights]) -> bool:
        """Whether the sum is cheaper as a matrix than as factors.

        It is if its rank exceeds its sides, or half of them if it is decomposed next.
        """
        if any(part.kron_factors() is not None or part.dense for part in parts):
            return True
        rank = sum(product_rank(term) for term in task.terms)
        smaller = min(task.entries[0].facts.columns, parts[0].rows)
        return rank > smaller * (THIN if task.ranked else 1.0)

    def _mixed(self, task: Task, parts: Sequence[Weights]) -> Weights:
        from adaptkit.linalg.mixing import mix

        assert self.plan.mixing is not None
        how = self.plan.mixing
        deltas = (part.delta() for part in parts)
        seeds = [f"{how.seed}/{term.number}/{task.label}" for term in task.terms]
        mixed = mix(deltas, how.method, how.density, seeds)
        kind = dense_kind()
        if isinstance(parts[0], kind):  # keeps the role of a bias or norm
            return replace(parts[0], diff=mixed)  # type: ignore[type-var]
        return kind.holding(mixed, task.kernel or ())

    def _term(self, task: Task, number: int, term: Term, tensors: Mapping[str, Tensor]) -> Weights:
        weights = self._joined(task, number, term, tensors)
        if "base" in tensors and not (type(weights) is task.kind or self._resizes(task, weights)):
            change = changed(weights, tensors["base"], term.weight)
            return dense_kind().holding(change, task.kernel or ())
        return weights if term.weight == 1.0 else weights.times(term.weight)

    def _resizes(self, task: Task, weights: Weights) -> bool:
        """Whether the base only measures the error: the kind stays, or becomes its resized kind."""
        return task.ranked and not weights.additive and type(weights).resized == task.kind.name

    def _joined(
        self, task: Task, number: int, term: Term, tensors: Mapping[str, Tensor]
    ) -> Weights:
        """The parts of one adapter, cut and fused."""
        entries = iter(enumerate(term.job.entries))
        becomes = task.ranked or bool(task.changes & {"summed", "changed"})
        if becomes and not task.ranked and not task.one_difference:
            # computed wide, so that only the rounding of what is stored is lost
            tensors = {name: _wide(tensor) for name, tensor in tensors.items()}
        whole: list[Weights | None] = []
        for part in term.job.parts:
            if part.entry is None:
                whole.append(None)
                continue
            n, entry = next(entries)
            whole.append(
                entry.decode({role: tensors[f"{number}.{n}/{role}"] for role, _ in entry.tensors()})
            )
        kernel = term.job.entries[0].facts.kernel
        try:
            return joined(term.job.parts, whole, task.kind if becomes else None, kernel)
        except NotRepresentable:
            if "base" not in tensors or not becomes:
                raise
            changed = differences(term.job.parts, whole, _wide(tensors["base"]))
            return joined(term.job.parts, changed, task.kind, kernel)

    # --- what is stored ----------------------------------------------------------------------

    def _store(
        self,
        task: Task,
        exact: Weights,
        kept: Weights,
        tensors: Mapping[str, Tensor],
        decomposed: Decomposition | None = None,
    ) -> Stored:
        """Round to what is written, and measure the error against the exact weights."""
        kind, place = type(kept), self.plan.keys.format.alpha
        kept = kept.unrolled() if self.plan.keys.format.peft else kept
        folded = (
            kept.folded()
            if "folded" in task.changes or (place is Alpha.NONE and not kept.bounded)
            else kept
        )
        dtype = torch_dtype(dtype_of(self.plan, task))
        whole = folded.encode()
        encoded = round_all(kind, whole, dtype)
        first = task.entries[0]
        like = first.facts if first.kind is kind else None
        rounded, facts, shapes, alpha = as_read(kind, encoded, like=like)
        known = None if decomposed is None else decomposed.norm
        norm, error = lost(exact, rounded, self._base(task, tensors), known)
        found = self._laid_out(task, kind, facts, encoded)
        gone = sum(vanished(whole[role], encoded[role]) for role in shapes)
        return Stored(
            kind,
            facts.rank,
            alpha or 0.0,
            shapes,
            norm,
            error,
            gone,
            scale=facts.scale,
            facts=facts if kind.peft_kept else None,
            tensors=found,
        )

    def _store_stack(
        self,
        tasks: Sequence[Task],
        exact: Weights,
        decomposed: Sequence[Decomposition],
        ranks: Sequence[int],
    ) -> list[Stored | Later[Stored]]:
        """Store a stack, each member cut to its rank."""
        kind, dtype = tasks[0].kind, torch_dtype(dtype_of(self.plan, tasks[0]))
        rounded = round_stack(kind.keep_stack(exact, decomposed, ranks), kind, dtype)

        def member(n: int) -> Stored:
            return self._member(n, rounded, tasks[n], decomposed[n], ranks[n])

        if not rounded.late:
            return [member(n) for n in range(len(tasks))]
        size = sum(tensor[0].nbytes for tensor in rounded.encoded.values())
        return [Later(partial(member, n), size) for n in range(len(tasks))]

    def _member(
        self, n: int, whole: RoundedStack, task: Task, decomposed: Decomposition, rank: int
    ) -> Stored:
        import torch

        shapes = decomposed.shapes(rank)
        own = {
            role: whole.encoded[role][n][tuple(map(slice, shape))] for role, shape in shapes.items()
        }
        own[ALPHA] = torch.tensor(float(rank))
        tensors = self._laid_out(task, task.kind, whole.facts, own)
        gone = sum(whole.gone[n].get(role, 0) for role in shapes)
        lost = whole.errors[n]
        return Stored(
            task.kind, rank, float(rank), shapes, decomposed.norm, lost, gone, tensors=tensors
        )

    def _base(self, task: Task, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The base weight in the order of rows of the new format."""
        base = tensors.get("base")
        swapped = base is not None and self.plan.keys.swapped(task.slot)
        return exchanged(base, -2) if swapped and base is not None else base

    def _laid_out(
        self, task: Task, kind: type[Weights], facts: Facts, encoded: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rounded tensors by key, in the shapes of the format, with alpha if it stores one."""
        shapes = {role: tuple(tensor.shape) for role, tensor in encoded.items() if role != ALPHA}
        found = {
            name: back(encoded[role].reshape(shape).contiguous())
            for role, name, shape in named(self.plan, task, kind, shapes)
            if role not in kind.shared or self.plan.bears(task)
        }
        if ALPHA in encoded and not self._silent(task, kind, facts.scale):
            found[self.plan.keys.spell(task.slot, kind.name, ALPHA)] = back(
                encoded[ALPHA].contiguous()
            )
        return found

    def _silent(self, task: Task, kind: type[Weights], scale: float) -> bool:
        """Whether the format stores no alpha."""
        if kind.bounded:
            return False
        place = self.plan.keys.format.alpha
        if "folded" in task.changes and place is not Alpha.TENSOR:
            return True
        return place in (Alpha.NONE, Alpha.CONFIG) or (place is Alpha.OPTIONAL and scale == 1.0)


def _cut(found: Decomposition, rank: int, stored: Any) -> Cut | Later[Cut]:
    if isinstance(stored, Later):
        return Later(lambda: Cut(found, rank, stored.make()), stored.nbytes)
    return Cut(found, rank, stored)


def _wide(tensor: Tensor) -> Tensor:

    return tensor.double() if tensor.is_floating_point() else tensor


def _finite(task: Task, tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFinite with the key of the tensor; a decomposition would only not converge."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            number, _, rest = name.partition(".")
            n, _, role = rest.partition("/")
            if name == "base":
                raise NonFinite("the base weight holds NaN or infinity")
            job = task.terms[int(number)].job
            raise NonFinite(
                "holds NaN or infinity",
                file=job.adapter.source.path,
                tensor=job.entries[int(n)].keys[role],
            )
