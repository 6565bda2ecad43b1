"""Pairing of two checkpoints: the slots that both hold, and those without a counterpart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.checkpoint import Checkpoint, Piece
from adaptkit.detect import ENOUGH, is_adapter
from adaptkit.errors import (
    AdaptkitError,
    NoSuchName,
    NotRepresentable,
    ShapeMismatch,
    UnknownAdapter,
)
from adaptkit.families.contract import Kind
from adaptkit.files.open import open_source
from adaptkit.files.packed import unpacked
from adaptkit.files.quantized import FP8
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import algorithms
from adaptkit.keymap.kinds import dense_kind, vector_kind
from adaptkit.names import BIAS, Slot, Target
from adaptkit.ops.adapter_file.peft_config import check_window
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import FLOATS, Shared, Unused, stored_dtype
from adaptkit.unknown import family_of_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from adaptkit.files.source import TensorSource
    from adaptkit.keymap import KeyMap

__all__ = ["Pair", "Pairing", "Wanted", "open_pair"]


@dataclass(frozen=True)
class Pair:
    """One slot of both checkpoints.

    `algorithm` is None if no adapter can hold the slot; `why` then gives the reason.
    """

    slot: Slot | None
    label: str
    base: tuple[Piece, ...]
    tuned: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: str
    algorithm: str | None = None
    role: str = "diff"
    why: str = ""
    # position among the pairs of a plan
    number: int = 0
    # whether the format stores the two halves of its rows exchanged
    swapped: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Return (rows, columns) of the slot as a matrix."""
        columns = 1
        for n in self.shape[1:]:
            columns *= n
        return (self.shape[0] if self.shape else 1), columns


@dataclass(frozen=True)
class Wanted:
    """What to fit to the difference: matrices by `algorithm`, vectors in full or not at all.

    Vectors are biases and norms. `options` select modules and the dtype.
    """

    algorithm: str
    vectors: bool
    options: Shared


def open_pair(
    base: Path, tuned: Path, family: str | None, *, ema: bool = False
) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints of one family; raise ShapeMismatch if the families differ.

    A checkpoint of ambiguous family follows the base. If no family fits the base, both are opened
    under their own names, provided that these agree (`known` is then False). `ema` reads averaged
    weights; NoSuchName is raised if neither checkpoint has any.
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
            "neither checkpoint holds averaged (EMA) weights", hint="omit --ema", file=tuned
        )
    return pair


def _close(opened: Iterable[Checkpoint | TensorSource]) -> None:
    for one in opened:
        one.close()


def _partner(first: Checkpoint, tuned: Path, family: str | None, ema: bool) -> Checkpoint:
    """Open the tuned checkpoint, as one of the base's family if ambiguous."""
    try:
        second = Checkpoint.open(tuned, family=family, ema=ema)
        other = second.family.name != first.family.name
        if other and first.family.name in second.detection.alternatives:
            second.close()
            second = Checkpoint.open(tuned, family=first.family.name, ema=ema)
    except AdaptkitError:
        first.close()
        raise
    if first.family.name != second.family.name:
        _close((first, second))
        raise ShapeMismatch(
            f"the base is {first.family.title}, the tuned checkpoint is {second.family.title}",
            hint="pass two checkpoints of one family; see `adaptkit inspect` on both",
        )
    return second


def _under_own_names(
    base: Path, tuned: Path, ema: bool, unknown: UnknownAdapter
) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints of an unknown family; raise `unknown` if their names differ."""
    sources: list[TensorSource] = []
    try:
        for path in (base, tuned):
            sources.append(unpacked(open_source(path)))
        family = family_of_weights(
            *({n: info.shape for n, info in s.infos.items()} for s in sources)
        )
        first, second = (Checkpoint.under_own_names(source, family, ema=ema) for source in sources)
        ours, theirs = first.targets().keys(), second.targets().keys()
        adapters = any(is_adapter(source.infos) for source in sources)
        if adapters or not ours or len(ours & theirs) < ENOUGH * min(len(ours), len(theirs)):
            if not adapters:
                unknown.hint = f"{unknown.hint}; other families need the same names in both files"
            raise unknown
    except AdaptkitError:
        _close(sources)
        raise
    return first, second


# parts that are skipped
_SKIPPED = {"ema": "not compared", "replaced": "its average is read instead"}


class Pairing:
    """Find each target in both checkpoints.

    `lost` collects the layers without a counterpart, `left` the parts that are not compared.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, keys: KeyMap, wanted: Wanted) -> None:
        self.base, self.tuned, self.keys, self.wanted = base, tuned, keys, wanted
        self.options = wanted.options
        self.selection = Selection(self.options.only, self.options.skip, base.family)
        self.lost: list[Unused] = []
        self.left: list[Unused] = []

    def pairs(self) -> tuple[Pair, ...]:
        """Return all slots to fit or to compare, numbered in the tuned checkpoint's order.

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
        if self.selection(Slot(target), self.base.label(Slot(target))):
            self.lost.extend(Unused(name, reason) for name in held.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes on the checkpoints that the user should know."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        if not self.base.known:
            yield (
                "This model family is unknown: the modules of the adapter are named as in the "
                "checkpoints, and a host may use other names."
            )
        for which, checkpoint in (("base", self.base), ("tuned checkpoint", self.tuned)):
            narrow = sum(checkpoint.source.infos[name].dtype in FP8 for name in checkpoint.places)
            if narrow:
                yield (
                    f"The {which} stores {narrow} weights as fp8: the difference includes their "
                    "rounding."
                )
            if checkpoint.ema:
                yield (
                    f"The averaged (EMA) values of {checkpoint.ema} weights of the {which} are "
                    "read."
                )

    def _target(
        self, target: Target, ours: Mapping[Slot, str], theirs: Mapping[Slot, str]
    ) -> Iterator[Pair]:
        refusal = self.base.refusal(ours.values()) or self.tuned.refusal(theirs.values())
        for slot in self.keys.slots(target) or (Slot(target),):
            label = self.base.label(slot)
            if not self.selection(slot, label):
                continue
            base, tuned = self.base.locate(slot, ours), self.tuned.locate(slot, theirs)
            if refusal is not None:
                reason = f"stored as {refusal}, not as floats; use an fp8, fp16, bf16 or fp32 file"
                self.lost.append(Unused(next(iter(theirs.values())), reason))
            elif base is None or tuned is None:
                self.lost.append(Unused(label, "stored in parts that do not form this layer"))
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
        """Return the dtype to write: that of the first float among tuned and base, else F16.

        fp8 does not count as a float here.
        """
        found = [
            c.source.infos[pieces[0].name].dtype
            for c, pieces in ((self.tuned, tuned), (self.base, base))
        ]
        kept = next((dtype for dtype in found if dtype in FLOATS), "F16")
        return stored_dtype(self.options.dtype, "F32" if kept == "F64" else kept)

    def _choose(self, pair: Pair) -> Pair:
        """Choose the algorithm for a slot."""
        slot = pair.slot
        assert slot is not None
        if not self.keys.slots(slot.target):
            return replace(pair, why=f"the {self.keys.format.name} format has no key for it")
        pair = replace(pair, swapped=self.keys.swapped(slot))
        row = self.keys.row(slot.target)
        kind = row.kind if row else Kind.MATRIX
        if slot.param == BIAS or kind is Kind.NORM:
            return self._vector(pair, slot, norm=kind is Kind.NORM)
        if kind is Kind.EMBEDDING and self.wanted.algorithm != dense_kind().name:
            return replace(pair, why=f"hosts load no {self.wanted.algorithm} for embeddings")
        wanted = algorithms().get(self.wanted.algorithm)
        if wanted is not None and self._configured:
            try:
                check_window(wanted, pair.shape[2:], wanted.forms[0])
            except NotRepresentable as error:
                return replace(pair, why=error.message)
        return replace(pair, algorithm=self.wanted.algorithm)

    def _vector(self, pair: Pair, slot: Slot, *, norm: bool) -> Pair:
        """A bias or the vector of a norm."""
        if not self.wanted.vectors:
            return replace(pair, why="biases and norms are left out; pass --vectors to keep them")
        wanted = algorithms().get(self.wanted.algorithm)
        beside = self.keys.beside_lora(slot) and wanted is not None and wanted.low_rank
        if self._configured and not beside:
            return replace(pair, why="PEFT holds no norms, and biases only beside a LoRA")
        holder = vector_kind()
        role = holder.vector_role(bias=slot.param == BIAS, norm=norm)
        assert role is not None
        return replace(pair, algorithm=holder.name, role=role)

    @property
    def _configured(self) -> bool:
        """Whether a PEFT configuration stands beside the adapter."""
        return self.keys.format.alpha is Alpha.CONFIG

    def _others(self) -> Iterator[Pair]:
        """Pair the parts that no adapter holds, so that their differences are reported."""
        ours, theirs = self.base.others, self.tuned.others
        for name, part in theirs.items():
            if part == "scale":
                continue
            if not self.selection.tensor(name, part) or part in _SKIPPED:
                self.left.append(Unused(name, f"{part}: {_SKIPPED.get(part, 'not compared')}"))
            elif name in ours:
                yield from self._other(name, part)
            elif self._weighs(self.tuned, name, part):
                self.lost.append(Unused(name, "not in the base checkpoint"))
            else:
                renamed = part != "unknown" and part in ours.values()
                reason = "the base uses other names" if renamed else "not in the base checkpoint"
                self.left.append(Unused(name, f"{part}: {reason}"))
        for name, part in ours.items():
            named = name in theirs or part in {*_SKIPPED, "scale"}
            if named or not self.selection.tensor(name, part):
                continue
            if self._weighs(self.base, name, part):
                self.lost.append(Unused(name, "not in the tuned checkpoint"))
            elif part == "unknown" or part not in theirs.values():
                self.left.append(Unused(name, f"{part}: not in the tuned checkpoint"))

    @staticmethod
    def _weighs(checkpoint: Checkpoint, name: str, part: str) -> bool:
        """Whether a tensor that no table names is a layer's weight, as far as its header tells."""
        info = checkpoint.source.infos[name]
        return part == "unknown" and len(info.shape) > 1 and info.dtype in (*FLOATS, *FP8)

    def _other(self, name: str, part: str) -> Iterator[Pair]:
        partner, info = self.base.source.infos[name], self.tuned.source.infos[name]
        refused = self.base.refusal([name]) or self.tuned.refusal([name])
        if partner.shape == info.shape and refused is None:
            piece = (Piece(name),)
            why = f"{part}: adapters cannot hold it"
            yield Pair(None, name, piece, piece, info.shape, info.dtype, why=why)
        elif (partner.shape, partner.dtype) != (info.shape, info.dtype):
            reason = f"{part}: different shape or dtype in the base checkpoint"
            self.left.append(Unused(name, reason))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a linear layer for a 1×1 convolution; both are the same matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape
