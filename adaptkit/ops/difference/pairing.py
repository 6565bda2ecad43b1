"""Two checkpoints side by side: which slots stand in both, what holds each, and what has no partner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.checkpoint import Checkpoint, Piece
from adaptkit.detect import ENOUGH, is_adapter
from adaptkit.errors import AdaptkitError, NoSuchName, ShapeMismatch, UnknownAdapter
from adaptkit.families.contract import Kind
from adaptkit.files.quantized import FP8
from adaptkit.files.source import open_source
from adaptkit.kinds import dense_kind, vector_kind
from adaptkit.names import BIAS, Slot, Target
from adaptkit.ops.shared import FLOATS, Shared, Unused, selected, stored_dtype
from adaptkit.unknown import family_of_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from adaptkit.files.source import TensorSource
    from adaptkit.keymap import KeyMap

__all__ = ["Pair", "Pairing", "Wanted", "open_pair"]


@dataclass(frozen=True)
class Pair:
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
    number: int = 0  # its place among the pairs of a plan
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


def open_pair(
    base: Path, tuned: Path, family: str | None, *, ema: bool = False
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, of one family; a look-alike follows the base. ShapeMismatch where they are of two.

    Where no family fits the base: both under their own names, if these are the same (`known` is then False). `ema`: the
    averaged weights, where a checkpoint has any; NoSuchName where neither has.
    """
    try:
        first = Checkpoint.open(base, family=family, ema=ema)
    except UnknownAdapter as error:
        if family is not None:
            raise
        pair = _under_own_names(base, tuned, ema, error)
    else:
        pair = first, _partner(first, tuned, family, ema)
    if ema and not any(checkpoint.ema for checkpoint in pair):
        _close(pair)
        raise NoSuchName(
            "neither checkpoint holds averaged (EMA) weights",
            hint="read the plain ones",
            file=tuned,
        )
    return pair


def _close(opened: Iterable[Checkpoint | TensorSource]) -> None:
    for one in opened:
        one.close()


def _partner(first: Checkpoint, tuned: Path, family: str | None, ema: bool) -> Checkpoint:
    """The tuned checkpoint, as one of the base's family."""
    try:
        second = Checkpoint.open(tuned, family=family, ema=ema)
        if second.family is not first.family and first.family.name in second.detection.alternatives:
            second.close()
            second = Checkpoint.open(tuned, family=first.family.name, ema=ema)
    except AdaptkitError:
        first.close()
        raise
    if first.family is not second.family:
        _close((first, second))
        raise ShapeMismatch(
            f"the base is {first.family.title}, the tuned checkpoint {second.family.title}",
            hint="extract needs two checkpoints of one family; see `adaptkit inspect`",
        )
    return second


def _under_own_names(
    base: Path, tuned: Path, ema: bool, unknown: UnknownAdapter
) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints of a family without a table, where they name their modules alike; else `unknown` of the base."""
    sources: list[TensorSource] = []
    try:
        for path in (base, tuned):
            sources.append(open_source(path))
        family = family_of_weights(
            *({n: info.shape for n, info in s.infos.items()} for s in sources)
        )
        first, second = (Checkpoint.under_own_names(source, family, ema=ema) for source in sources)
        ours, theirs = first.targets().keys(), second.targets().keys()
        adapters = any(is_adapter(source.infos) for source in sources)
        if adapters or not ours or len(ours & theirs) < ENOUGH * min(len(ours), len(theirs)):
            unknown.hint = f"{unknown.hint}; others need the same names in both files"
            raise unknown
    except AdaptkitError:
        _close(sources)
        raise
    return first, second


_PASSED_OVER = {
    "ema": "not compared",
    "replaced": "its average is read instead",
}  # parts of no interest here


class Pairing:
    """Finds each target in both checkpoints; what has no partner goes to `lost`, what an adapter cannot hold to `left`."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, keys: KeyMap, wanted: Wanted) -> None:
        self.base, self.tuned, self.keys, self.wanted = base, tuned, keys, wanted
        self.options = wanted.options
        self.lost: list[Unused] = []
        self.left: list[Unused] = []

    def pairs(self) -> tuple[Pair, ...]:
        """Every slot to fit or to compare, numbered in the tuned checkpoint's order.

        Fills `lost` and `left`.
        """
        return tuple(replace(pair, number=n) for n, pair in enumerate(self._pairs()))

    def _pairs(self) -> Iterator[Pair]:
        ours, theirs = self.base.targets(), self.tuned.targets()
        for target, held in theirs.items():
            if target not in ours:
                self._lose(held, target, "not in the base checkpoint")
            else:
                yield from self._target(target, ours[target], held)
        for target, held in ours.items():
            if target not in theirs:
                self._lose(held, target, "not in the tuned checkpoint")
        yield from self._others()

    def _lose(self, held: Mapping[Slot, str], target: Target, reason: str) -> None:
        if selected(self.base.label(Slot(target)), target.component, self.options):
            self.lost.extend(Unused(name, reason) for name in held.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of these checkpoints before the numbers."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        if not self.base.known:
            yield (
                "adaptkit has no table for this family: the adapter's modules have the checkpoints' own names, which a host "
                "may know by others."
            )
        for which, checkpoint in (("base", self.base), ("tuned checkpoint", self.tuned)):
            narrow = sum(checkpoint.source.infos[name].dtype in FP8 for name in checkpoint.places)
            if narrow:
                yield f"The {which} stores {narrow} weights as fp8: the difference holds what their rounding changed."
            if checkpoint.ema:
                yield f"Of the {which}, the averaged (EMA) values of {checkpoint.ema} weights are read."

    def _target(
        self, target: Target, ours: Mapping[Slot, str], theirs: Mapping[Slot, str]
    ) -> Iterator[Pair]:
        refusal = self.base.refusal(ours.values()) or self.tuned.refusal(theirs.values())
        for slot in self.keys.slots(target) or (Slot(target),):
            label = self.base.label(slot)
            if not selected(label, target.component, self.options):
                continue
            base, tuned = self.base.locate(slot, ours), self.tuned.locate(slot, theirs)
            if refusal is not None:
                reason = f"stored as {refusal}, not as floats: use the fp8, fp16, bf16 or fp32 file"
                self.lost.append(Unused(next(iter(theirs.values())), reason))
            elif base is None or tuned is None:
                self.lost.append(Unused(label, "stored in parts that do not make this layer"))
            else:
                yield from self._pair(slot, label, base, tuned)

    def _pair(
        self, slot: Slot, label: str, base: tuple[Piece, ...], tuned: tuple[Piece, ...]
    ) -> Iterator[Pair]:
        first, second = self.base.slot_shape(base), self.tuned.slot_shape(tuned)
        if _squeezed(first) != _squeezed(second):
            self.lost.append(
                Unused(
                    tuned[0].name,
                    f"shape {list(first)} in the base, {list(second)} in the tuned checkpoint",
                )
            )
            return
        yield self._choose(Pair(slot, label, base, tuned, second, self._dtype(base, tuned)))

    def _dtype(self, base: tuple[Piece, ...], tuned: tuple[Piece, ...]) -> str:
        """The dtype to write: the tuned checkpoint's, or that of the base where the tuned one's is fp8; float16 for two fp8."""
        found = [
            c.source.infos[pieces[0].name].dtype
            for c, pieces in ((self.tuned, tuned), (self.base, base))
        ]
        kept = next((dtype for dtype in found if dtype in FLOATS), "F16")
        return stored_dtype(self.options.dtype, "F32" if kept == "F64" else kept)

    def _choose(self, job: Pair) -> Pair:
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
            holder = vector_kind()
            role = holder.vector_role(bias=slot.param == BIAS, norm=kind is Kind.NORM)
            assert role is not None
            return replace(job, algorithm=holder.name, role=role)
        if kind is Kind.EMBEDDING and self.wanted.algorithm != dense_kind().name:
            return replace(job, why=f"hosts load no {self.wanted.algorithm} for embeddings")
        return replace(job, algorithm=self.wanted.algorithm)

    def _others(self) -> Iterator[Pair]:
        """The parts no adapter holds: compared, so that a difference there is not passed over in silence."""
        ours, theirs = self.base.others, self.tuned.others
        for name, part in theirs.items():
            if part == "scale":
                continue
            if part in _PASSED_OVER or not selected(name, part, self.options):
                self.left.append(Unused(name, f"{part}: {_PASSED_OVER.get(part, 'not compared')}"))
            elif name in ours:
                yield from self._other(name, part)
            else:
                renamed = part != "unknown" and part in ours.values()
                reason = (
                    "the base has it under other names" if renamed else "not in the base checkpoint"
                )
                self.left.append(Unused(name, f"{part}: {reason}"))
        for name, part in ours.items():
            named = name in theirs or part in {*_PASSED_OVER, "scale"}
            if (
                not named
                and (part == "unknown" or part not in theirs.values())
                and selected(name, part, self.options)
            ):
                self.left.append(Unused(name, f"{part}: not in the tuned checkpoint"))

    def _other(self, name: str, part: str) -> Iterator[Pair]:
        partner, info = self.base.source.infos[name], self.tuned.source.infos[name]
        refused = self.base.refusal([name]) or self.tuned.refusal([name])
        if partner.shape == info.shape and refused is None:
            piece = (Piece(name),)
            why = f"{part}: no adapter holds it"
            yield Pair(None, name, piece, piece, info.shape, info.dtype, why=why, counted=False)
        elif (partner.shape, partner.dtype) != (info.shape, info.dtype):
            self.left.append(Unused(name, f"{part}: other shape or dtype in the base checkpoint"))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1×1 convolution and a linear layer are the same matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape
