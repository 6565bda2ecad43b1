"""Two checkpoints side by side: which slots stand in both, what holds each, and what has no partner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.checkpoint import Checkpoint, Piece
from adaptkit.errors import AdaptkitError, ShapeMismatch
from adaptkit.families._family import Kind
from adaptkit.names import BIAS, Slot, Target
from adaptkit.ops._common import FLOATS, Shared, Unused, selected, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from adaptkit.keymap import KeyMap

__all__ = ["Job", "Pairing", "Wanted", "open_pair"]


@dataclass(frozen=True)
class Job:
    """One slot to fit, or (`algorithm` None) only to compare: then `why` says why an adapter cannot hold it."""

    slot: Slot | None
    label: str
    base: tuple[Piece, ...]
    tuned: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: str
    algorithm: str | None = None
    role: str = "diff"
    why: str = ""
    counted: bool = True  # whether its difference counts in the total: the model's own layers do, a VAE does not

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the slot as a matrix."""
        columns = 1
        for n in self.shape[1:]:
            columns *= n
        return (self.shape[0] if self.shape else 1), columns


@dataclass(frozen=True)
class Wanted:
    """What the difference is fitted by: matrices by `algorithm`; biases and norms as full differences, or (not `vectors`)
    left out. `options` select modules and the dtype."""

    algorithm: str
    vectors: bool
    options: Shared


def open_pair(base: Path, tuned: Path, family: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, of one family; a look-alike follows the base. ShapeMismatch where they are of two."""
    first = Checkpoint.open(base, family=family)
    try:
        second = Checkpoint.open(tuned, family=family)
        if second.family is not first.family and first.family.name in second.detection.alternatives:
            second.close()
            second = Checkpoint.open(tuned, family=first.family.name)
    except AdaptkitError:
        first.close()
        raise
    if first.family is not second.family:
        raise ShapeMismatch(
            f"the base is {first.family.title}, the tuned checkpoint {second.family.title}",
            hint="extract needs two checkpoints of one family; see `adaptkit inspect`",
        )
    return first, second


class Pairing:
    """Finds each target in both checkpoints; what has no partner goes to `lost`, what an adapter cannot hold to `left`."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, keys: KeyMap, wanted: Wanted) -> None:
        self.base, self.tuned, self.keys, self.wanted = base, tuned, keys, wanted
        self.options = wanted.options
        self.lost: list[Unused] = []
        self.left: list[Unused] = []

    def jobs(self) -> Iterator[Job]:
        """Every slot to fit or to compare, in the tuned checkpoint's order; fills `lost` and `left`."""
        ours, theirs = self.base.targets(), self.tuned.targets()
        for target, held in theirs.items():
            if target not in ours:
                self._lose(held, target, "not in the base checkpoint")
            else:
                yield from self._target(target, ours[target], held)
        for target in ours.keys() - theirs.keys():
            self._lose(ours[target], target, "not in the tuned checkpoint")
        yield from self._others()

    def _lose(self, held: Mapping[Slot, str], target: Target, reason: str) -> None:
        if selected(self.base.label(Slot(target)), target.component, self.options):
            self.lost.extend(Unused(name, reason) for name in held.values())

    def _target(self, target: Target, ours: Mapping[Slot, str], theirs: Mapping[Slot, str]) -> Iterator[Job]:
        for slot in self.keys.slots(target) or (Slot(target),):
            label = self.base.label(slot)
            if not selected(label, target.component, self.options):
                continue
            base, tuned = self.base.locate(slot, ours), self.tuned.locate(slot, theirs)
            if base is None or tuned is None:
                self.lost.append(Unused(label, "stored in parts that do not make this layer"))
                continue
            yield from self._pair(slot, label, base, tuned)

    def _pair(self, slot: Slot, label: str, base: tuple[Piece, ...], tuned: tuple[Piece, ...]) -> Iterator[Job]:
        first, second = self.base.slot_shape(base), self.tuned.slot_shape(tuned)
        if _squeezed(first) != _squeezed(second):
            self.lost.append(
                Unused(tuned[0].name, f"shape {list(first)} in the base, {list(second)} in the tuned checkpoint")
            )
            return
        dtypes = {self.base.source.infos[p.name].dtype for p in base} | {
            self.tuned.source.infos[p.name].dtype for p in tuned
        }
        if not dtypes <= set(FLOATS):
            self.lost.append(
                Unused(tuned[0].name, f"stored as {', '.join(sorted(dtypes - set(FLOATS)))}, not as plain floats")
            )
            return
        kept = self.tuned.source.infos[tuned[0].name].dtype
        dtype = stored_dtype(self.options.dtype, "F32" if kept == "F64" else kept)
        yield self._choose(Job(slot, label, base, tuned, second, dtype))

    def _choose(self, job: Job) -> Job:
        """Which algorithm holds this slot."""
        slot = job.slot
        assert slot is not None
        if not self.keys.slots(slot.target):
            return replace(job, why=f"the {self.keys.format.name} format has no place for it")
        row = self.keys.row(slot.target)
        kind = row.kind if row else Kind.MATRIX
        vector = slot.param == BIAS or kind is Kind.NORM
        if vector and not self.wanted.vectors:
            return replace(job, why="biases and norms are left out; --vectors carries them")
        if vector:
            role = ("b_norm" if slot.param == BIAS else "w_norm") if kind is Kind.NORM else "diff_b"
            return replace(job, algorithm="full", role=role)
        if kind is Kind.EMBEDDING and self.wanted.algorithm != "full":
            return replace(job, why=f"hosts load no {self.wanted.algorithm} for embeddings")
        return replace(job, algorithm=self.wanted.algorithm)

    def _others(self) -> Iterator[Job]:
        """The parts no adapter holds: compared, so that a difference there is not passed over in silence."""
        for name, part in self.tuned.others.items():
            info, partner = self.tuned.source.infos[name], self.base.source.infos.get(name)
            if part == "ema" or not selected(name, part, self.options):
                self.left.append(Unused(name, f"{part}: not compared"))
            elif partner is None:
                self.left.append(Unused(name, f"{part}: not in the base checkpoint"))
            elif partner.shape != info.shape or {partner.dtype, info.dtype} - set(FLOATS):
                if (partner.shape, partner.dtype) != (info.shape, info.dtype):
                    self.left.append(Unused(name, f"{part}: other shape or dtype in the base checkpoint"))
            else:
                piece = (Piece(name),)
                yield Job(
                    None, name, piece, piece, info.shape, info.dtype, why=f"{part}: no adapter holds it", counted=False
                )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1×1 convolution and a linear layer are the same matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape
