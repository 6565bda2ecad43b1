"""Adapters written anew: in another format or algorithm, at another rank, or several in one. The plan, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path  # noqa: TC003 - the types of options are read at run time
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.adapter import Adapter, Entry
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import formats
from adaptkit.errors import (
    AdaptkitError,
    ShapeMismatch,
)
from adaptkit.files.header import TensorSpec
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import KeyMap
from adaptkit.ops.ranks.options import Ranked
from adaptkit.ops.shared import Unused
from adaptkit.respelling import Assembly
from adaptkit.steps import Step, peak_memory

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

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
]

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

    job: Assembly
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
    number: int = 0  # its place among the tasks of a plan
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


def product_rank(term: Term) -> int:
    """The rank of the exact factors of what a term gives: parts that are fused add up."""
    infos = term.job.adapter.source.infos
    total = 0
    for entry in term.job.entries:
        shapes = {role: infos[key].shape for role, key in entry.tensors()}
        total += entry.kind.product_rank(shapes, entry.facts)
    return total
