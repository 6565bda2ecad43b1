"""The plan of a rewritten adapter: its tasks, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path  # noqa: TC003 - the types of options are read at run time
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.adapter import Adapter
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import formats
from adaptkit.errors import AdaptkitError, ShapeMismatch
from adaptkit.formats.contract import Alpha
from adaptkit.ops.ranks.options import Ranked
from adaptkit.ops.shared import Closing, chosen_by
from adaptkit.steps import Step, peak_memory
from adaptkit.unknown import joint

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Piece
    from adaptkit.entries import Entry
    from adaptkit.files.header import TensorSpec
    from adaptkit.keymap import Dialect, KeyMap
    from adaptkit.names import Slot
    from adaptkit.ops.ranks.rules.contract import Policy
    from adaptkit.ops.selecting import Selection
    from adaptkit.ops.shared import LeftOut, Unused
    from adaptkit.respelling import Assembly

__all__ = [
    "CHANGES",
    "Copied",
    "Dropped",
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
    "packed",
)


@dataclass(frozen=True)
class RecastOptions(Ranked):
    """The options of every verb that rewrites adapters.

    `algo` is the algorithm to change to, `factor` the small factor of a LoKr. `base` is the
    checkpoint that kinds like DoRA need for a difference. `alpha_in` is the alpha of every input
    module, whatever the file says: a number, or `as-rank`. `blocks` are rules for the weight of
    modules (see adaptkit.ops.block_weights); those of weight 0 are left out.
    """

    blocks: tuple[str, ...] = ()
    algo: str | None = None
    factor: int = 8
    base: Path | None = None
    alpha_in: str | None = None


class Copied(NamedTuple):
    """A tensor copied byte for byte from the adapter of this number, perhaps reshaped."""

    key: str
    source: str
    spec: TensorSpec
    number: int = 0


class Written(NamedTuple):
    """An alpha that the source does not store."""

    key: str
    value: float


class Dropped(NamedTuple):
    """A module without a place in the new format: all of it counts as lost."""

    adapter: Adapter
    entry: Entry
    weight: float = 1.0


class Term(NamedTuple):
    """The part of one adapter in a slot, and its weight."""

    job: Assembly
    weight: float = 1.0
    number: int = 0  # of the adapter


@dataclass(frozen=True)
class Task:
    """One slot of the output. `ready` are tensors to copy; None means that it is computed.

    `changes` says why. If a policy chooses the rank (`ranked`), `ready` is copied if the module
    keeps its rank. `base` is the place of the slot in the base checkpoint, for terms whose ΔW
    depends on it. Tasks of equal `likeness` are computed as one stack, None alone.
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
        """All entries that are read for this task."""
        return tuple(entry for term in self.terms for entry in term.job.entries)

    @property
    def label(self) -> str:
        """The name that people know it by."""
        return self.terms[0].job.label

    @cached_property
    def dtypes(self) -> frozenset[str]:
        """The dtypes of all tensors that are read for this task."""
        terms = (
            (term.job.adapter.source.infos, entry)
            for term in self.terms
            for entry in term.job.entries
        )
        return frozenset(infos[key].dtype for infos, entry in terms for _, key in entry.tensors())

    @cached_property
    def kernel(self) -> tuple[int, ...] | None:
        """The kernel size of the layer, None if it is not known."""
        known = (entry.facts.kernel for entry in self.entries)
        return next((kernel for kernel in known if kernel is not None), None)

    @property
    def one_difference(self) -> bool:
        """Whether it is one whole difference as it is stored, which float32 holds exactly."""
        (term, *more), (entry, *others) = self.terms, self.entries
        alone = not more and not others and len(term.job.parts) == 1
        return alone and entry.kind.dense and entry.facts.scale == 1.0 and term.weight == 1.0

    @property
    def convolution(self) -> bool:
        """Whether `--conv-rank` applies: the kernel is larger than 1."""
        return any(n > 1 for n in self.kernel or ())


@dataclass(frozen=True, slots=True)
class Into:
    """The format to write, how, and whether to fold alpha into the weights in any case."""

    format: str
    fold: bool
    dialect: Dialect | None = None

    @property
    def config(self) -> bool:
        """Whether the output is a folder, since a configuration file states alpha."""
        return formats()[self.format].alpha is Alpha.CONFIG

    @classmethod
    def plain(cls, format: str) -> Into:
        """A format as it is."""
        return cls(format, formats()[format].alpha is Alpha.NONE)


@dataclass(frozen=True, repr=False)
class Recast(Closing):
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
    dropped: tuple[Dropped, ...] = ()
    left_out: LeftOut | None = None
    # what the ranks are weighed by, see adaptkit.ops.rewrite.weighing
    norms: Callable[[Sequence[Task]], list[float]] | None = None
    beside: Checkpoint | None = None  # that checkpoint
    layout: str = ""  # whose arrangement the finished file is packed into

    @property
    def adapter(self) -> Adapter:
        """The first adapter, whose family and metadata the output takes."""
        return self.adapters[0]

    def bears(self, task: Task) -> bool:
        """Whether the tensors that all modules of its kind share are written with this task."""
        return self.bearers.get(task.kind.name) == task.number

    @cached_property
    def bearers(self) -> Mapping[str, int]:
        """The number of the first task of each kind that shares tensors."""
        found: dict[str, int] = {}
        for task in self.tasks:
            if task.kind.shared:
                found.setdefault(task.kind.name, task.number)
        return found

    @property
    def spellings(self) -> tuple[str, str]:
        """The format or layout of the first adapter, and of the output."""
        source = self.adapter.source
        return source.layout or self.adapter.format.name, self.layout or self.keys.format.name

    def counts(self) -> dict[str, int]:
        """How many slots are renamed, split, fused, folded, …"""
        found = Counter(c for task in self.tasks for c in (task.changes or {self.plainly(task)}))
        return {name: found[name] for name in (*CHANGES, "unchanged") if found[name]}

    def plainly(self, task: Task) -> str:
        """What becomes of a module that no other change applies to."""
        if self.layout:
            return "packed"
        ready = task.ready or ()
        same = all(isinstance(item, Copied) and item.key == item.source for item in ready)
        # a layout of its own stores other tensors than are read
        same = same and not any(adapter.source.layout for adapter in self.adapters)
        return "unchanged" if ready and same else "renamed"

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--dry-run` prints it; `bytes_out_copied` counts copied tensors only."""
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
            "from": self.spellings[0],
            "to": self.spellings[1],
            "modules": len(self.tasks),
            **chosen_by(self.left_out),
            **self.counts(),
            "bytes_in": sum(adapter.source.size for adapter in self.adapters),
            "bytes_out_copied": sum(
                self.nbytes(item) for item in dict.fromkeys((*ready, *self.carried))
            ),
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
        for checkpoint in (self.base, self.beside):
            if checkpoint is not None:
                checkpoint.close()


@dataclass(frozen=True)
class Mixing:
    """How several ΔW become one, entry by entry.

    `method` is ties, dare, dare-ties or magnitude; `density` the share of entries that is kept;
    `seed` chooses those that dare drops.
    """

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
    """Open adapters of one family; ShapeMismatch if they are of two.

    An adapter that may be of two families is read as of the family of the first.
    """
    found: list[Adapter] = []
    try:
        for path in paths:
            adapter = Adapter.open(
                path, family=options.family, format=options.format, alpha=options.alpha_in
            )
            if found and adapter.family.name != found[0].family.name:
                adapter = _alike(found[0], adapter, options.alpha_in)
            found.append(adapter)
    except AdaptkitError:
        for adapter in found:
            adapter.close()
        raise
    if options.base is not None and not any(adapter.known for adapter in found):
        return _named_by(options.base, found, options)
    family = joint([adapter.family for adapter in found])
    return tuple(adapter.with_dots(family) for adapter in found)


def _named_by(
    path: Path, adapters: Sequence[Adapter], options: RecastOptions
) -> tuple[Adapter, ...]:
    """Adapters of an unknown family, with the module names of their base."""
    paths = [adapter.source.path for adapter in adapters]
    for adapter in adapters:
        adapter.close()
    with Checkpoint.open(path, strangers=True) as base:
        if base.known:
            raise ShapeMismatch(
                f"the base is {base.family.title}, the adapter is for an unknown family",
                hint=f"--family {base.family.name} reads its names as those of {base.family.title}",
                file=paths[0],
            )
        return tuple(
            Adapter.open_as(one, base.family, format=options.format, alpha=options.alpha_in)
            for one in paths
        )


def _alike(first: Adapter, other: Adapter, alpha: str | None) -> Adapter:
    """`other`, read as of the family of the first if its names allow that."""
    path = other.source.path
    if first.family.name in other.detection.alternatives:
        other.close()
        return Adapter.open(path, family=first.family.name, alpha=alpha)
    if not first.known and not other.known:
        return other
    other.close()
    raise ShapeMismatch(
        f"this adapter is for {other.family.title}, the first one for {first.family.title}",
        hint="only adapters of one family can be put together; see `adaptkit inspect`",
        file=path,
    )


def chosen_entries(adapter: Adapter, selection: Selection) -> Mapping[Slot, Entry]:
    """The modules that `--only` and `--skip` leave."""
    return {s: e for s, e in adapter.entries.items() if selection(s, adapter.label(s))}


def product_rank(term: Term) -> int:
    """The rank of the exact factors of a term; fused parts add up."""
    infos = term.job.adapter.source.infos
    total = 0
    for entry in term.job.entries:
        shapes = {role: infos[key].shape for role, key in entry.tensors()}
        total += entry.kind.product_rank(shapes, entry.facts)
    return total
