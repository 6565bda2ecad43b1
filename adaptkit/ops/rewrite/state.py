"""The state of every module while an adapter is rewritten."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.entries import shared_name
from adaptkit.errors import NotRepresentable
from adaptkit.files.quantized import FP8
from adaptkit.formats.contract import Alpha
from adaptkit.ops.adapter_file.peft_config import PeftModule
from adaptkit.ops.adapter_file.size import module_size
from adaptkit.ops.shared import FLOATS, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Decomposition, Facts, Weights
    from adaptkit.files.header import TensorSpec
    from adaptkit.ops.ranks.knapsack import RankCurve
    from adaptkit.ops.rewrite.plan import Recast, Task

__all__ = ["Cut", "State", "Stored", "count", "curve_of", "dtype_of", "named", "stays"]


@dataclass
class Stored:
    """A slot as it is written.

    `norm` is ‖ΔW‖², `error` the ‖·‖² that was lost; None if that needs the base weight. `zero`
    means that the terms cancel.
    """

    kind: type[Weights]
    rank: int | None
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]
    norm: float | None = None
    error: float | None = None
    vanished: int = 0  # numbers that rounding made zero
    zero: bool = False
    scale: float = 1.0  # what a reader multiplies the stored product by
    facts: Facts | None = None  # of kinds whose configuration is written again
    tensors: dict[str, Tensor] = field(default_factory=dict)
    specs: tuple[TensorSpec, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers stored, alpha aside."""
        return sum(count(shape) for shape in self.shapes.values())


class State:
    """The decomposition of each task, the rank chosen and what is stored, so far as known."""

    def __init__(self, plan: Recast) -> None:
        self.plan = plan
        self.decomposed: dict[int, Decomposition] = {}
        self.ranks: dict[int, int] = {}
        self.stored: dict[int, Stored] = {}
        self._unchanged: dict[int, Stored] = {}

    def copied(self, task: Task) -> bool:
        """Whether the tensors of a task are copied, so far as known."""
        return task.ready is not None and task.number not in self.stored and not self.dropped(task)

    def dropped(self, task: Task) -> bool:
        """Whether the policy left the module out."""
        return self.ranks.get(task.number) == 0

    def outcome(self, task: Task) -> Stored | None:
        """What the file holds of a task, stored or copied; None if it is left out."""
        if self.dropped(task):
            return None
        return self.stored.get(task.number) or self.unchanged(task)

    def unchanged(self, task: Task) -> Stored:
        """The task as its source stores it, from headers alone."""
        if task.number not in self._unchanged:
            entry, infos = task.entries[0], task.terms[0].job.adapter.source.infos
            shapes = {role: infos[key].shape for role, key in entry.tensors()}
            rank = entry.facts.rank
            alpha = 1.0 if rank is None else entry.facts.scale * rank
            facts = entry.facts if task.kind.peft_kept else None
            self._unchanged[task.number] = Stored(
                task.kind, rank, alpha, shapes, scale=entry.facts.scale, facts=facts
            )
        return self._unchanged[task.number]

    def modules(self) -> list[PeftModule]:
        """The modules as a PEFT configuration names them."""
        return [
            self.module(task, stored)
            for task in self.plan.tasks
            if (stored := self.outcome(task)) is not None
        ]

    def module(self, task: Task, stored: Stored) -> PeftModule:
        """A module as a PEFT configuration names it."""
        name = self.plan.keys.module(task.slot)
        # two full LoKr factors have no rank, but PEFT multiplies them by alpha / r: both are 1
        rank, alpha = (1, 1.0) if stored.rank is None else (stored.rank, stored.alpha)
        config = task.terms[0].job.adapter.configuration(task.slot.component)
        return PeftModule(name, stored.kind, rank, alpha, stored.shapes, stored.facts, config)


@dataclass(frozen=True)
class Cut:
    """A module decomposed and its rank chosen; `stored` is None if it stays as it is."""

    found: Decomposition
    rank: int
    stored: Stored | None


def curve_of(plan: Recast, task: Task, found: Decomposition) -> RankCurve:
    """The energies of a module and its bytes by rank, 0 first, for a policy."""
    from adaptkit.ops.ranks.knapsack import RankCurve

    dtype, stem = dtype_of(plan, task), plan.keys.stem(task.slot)
    alpha = plan.keys.format.alpha is Alpha.TENSOR and ALPHA in task.kind.roles
    tensors = len(found.shapes(1))
    sizes = [n and module_size(n, dtype, stem, tensors, alpha=alpha) for n in found.elements()]
    return RankCurve(found.energies, found.norm, sizes, task.convolution)


def stays(state: State, task: Task, found: Decomposition, rank: int) -> bool:
    """Whether a module keeps its full rank and the sizes of its tensors."""
    return (
        task.ready is not None
        and rank == len(found.energies)
        and found.shapes(rank).keys() == state.unchanged(task).shapes.keys()
        and all(
            count(found.shapes(rank)[r]) == count(s)
            for r, s in state.unchanged(task).shapes.items()
        )
    )


def named(
    plan: Recast, task: Task, kind: type[Weights], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(role, key, shape as the format lays it out) of every tensor but alpha."""
    peft = plan.keys.format.peft
    facts = kind.facts(shapes)
    for role, shape in shapes.items():
        laid_out = kind.laid_out(role, shape, facts, peft=peft)
        if role in kind.shared:
            yield role, shared_name(kind, role), laid_out
            continue
        name = plan.keys.spell(task.slot, kind.name, kind.stored_as(role, peft=peft))
        yield role, name, plan.keys.flat(name, laid_out)


def dtype_of(plan: Recast, task: Task) -> str:
    """The widest dtype among the parts, or the one asked for."""
    kept = {dtype for dtype in task.dtypes if not dtype.startswith(("I", "U", "BOOL"))}
    # fp8 is a storage format: what is computed from it is written as float16
    kept = {"F16" if dtype in FP8 else dtype for dtype in kept}
    if not kept <= set(FLOATS):
        names = ", ".join(sorted(kept - set(FLOATS)))
        raise NotRepresentable(f"stored as {names}; only plain floats can be computed with")
    widest = (
        min(kept, key=FLOATS.index) if len(kept) == 1 or "F32" in kept or "F64" in kept else "F32"
    )
    return stored_dtype(plan.options.dtype, widest)


def count(shape: Sequence[int]) -> int:
    """The number of entries of a tensor of this shape."""
    total = 1
    for n in shape:
        total *= n
    return total
