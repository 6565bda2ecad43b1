"""Measurement of one match: from the stored tensors to norms and distances."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import same
from adaptkit.checkpoint import exchanged
from adaptkit.errors import NonFinite, NotRepresentable
from adaptkit.files.tensors import finite
from adaptkit.ops.compare.distance import (
    BLOCK,
    Difference,
    Numbers,
    alike,
    applied,
    difference,
    form,
    measure,
    widened,
)
from adaptkit.ops.compare.stacked import likeness_of, measure_stack
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.entries import Entry
    from adaptkit.ops.compare.matching import Match, Side

__all__ = ["Measurer", "needs_base"]

# bytes of a float64
WIDE = 8


def needs_base(entry: Entry, label: str) -> NotRepresentable:
    """Return the error for unequal non-additive modules without a base."""
    return NotRepresentable(
        f"ΔW of a {entry.kind.title} depends on the weight of the checkpoint",
        hint="pass the adapters' checkpoint as --base; without it, only equal tensors compare",
        tensor=label,
    )


class Measurer:
    """Plan, read and measure matches."""

    def __init__(self, base: Checkpoint | None, tuned: Checkpoint | None) -> None:
        self.base, self.tuned = base, tuned

    # planning

    def step(self, match: Match) -> Step[Match]:
        """Return the step of a match, with the working memory it needs."""
        applying = max(map(self._applying, match.sides), default=0)
        size = max(4 * WIDE * BLOCK * _in_blocks(match), applying)
        size += sum(self._bytes(side, factors=not _in_blocks(match)) for side in match.sides)
        size += sum(checkpoint.nbytes(pieces) for _, checkpoint, pieces in self._pieces(match))
        first = next((side for side in match.sides if side.entry), None)
        if match.change is not None and self.tuned is not None:
            order = self.tuned.source.order(match.change[1][0].name)
        else:
            assert first is not None
            assert first.entry is not None
            order = first.given.adapter.source.order(next(key for _, key in first.entry.tensors()))
        return Step(match, match.number, size, order)

    def _bytes(self, side: Side, *, factors: bool) -> int:
        """Return the working memory of a side: tensors as stored, in float64, and results."""
        if side.entry is None:
            return 0
        facts = side.entry.facts
        infos = [side.given.adapter.source.infos[key] for _, key in side.entry.tensors()]
        stored, elements = sum(info.nbytes for info in infos), sum(info.numel for info in infos)
        if side.entry.kind.dense:
            return stored + WIDE * BLOCK  # a block at another strength
        size = stored + 2 * WIDE * elements
        if factors and side.entry.kind.kron:
            shapes = {
                role: side.given.adapter.source.infos[key].shape
                for role, key in side.entry.tensors()
            }
            return stored + WIDE * max(elements, side.entry.kind.whole_numbers(shapes))
        if side.base is not None and self.base is not None:
            rows_apart = side.entry.kind.row_wise
            return size + WIDE * math.prod(self.base.slot_shape(side.base)) * (not rows_apart)
        if not factors:
            return size
        # factors in float64, and one after the other scaled beside those of the other side
        return size - WIDE * elements + 6 * (side.rank or 0) * (facts.rows + facts.columns)

    def _applying(self, side: Side) -> int:
        """Return the bytes that it takes to apply a side to its weight in float64."""
        if side.entry is None or side.base is None or self.base is None:
            return 0
        rows, *rest = self.base.slot_shape(side.base)
        kind = side.entry.kind
        return kind.applying_wide * kind.applying(rows, math.prod(rest))

    def _pieces(self, match: Match) -> Iterator[tuple[str, Checkpoint, tuple[Piece, ...]]]:
        """Yield the pieces to read from the checkpoints, once each, with a name."""
        if self.base is not None:
            for one in _read_of_base(match):
                yield _name(match, one), self.base, one
        if match.change is not None and self.tuned is not None:
            yield "tuned", self.tuned, match.change[1]

    # running

    def load(self, match: Match) -> dict[str, Tensor]:
        """Read all tensors: of side n as `n/role`, of the base by name, of `tuned`."""
        found = {name: checkpoint.read(pieces) for name, checkpoint, pieces in self._pieces(match)}
        for n, side in enumerate(match.sides):
            if side.entry is not None:
                found |= {
                    f"{n}/{role}": tensor
                    for role, tensor in side.given.adapter.read(side.entry).items()
                }
        return found

    def steps_on(self, device: str, steps: Sequence[Step[Match]]) -> Sequence[Step[Match]]:
        """The steps for a device: an accelerator takes matches of one likeness together."""
        from adaptkit.linalg.precision import works_on_stacks

        if not works_on_stacks(device):
            return steps
        keys = [likeness_of(step.payload, self.base, self.tuned) for step in steps]
        return [
            step if key is None else replace(step, shape=key)
            for step, key in zip(steps, keys, strict=True)
        ]

    def work(self, matches: Sequence[Match], tensors: dict[str, Tensor]) -> list[Numbers]:
        """Measure matches of one likeness, or one."""
        found: Sequence[Numbers | None] = [None] * len(matches)
        if self._together(matches, tensors):
            change = matches[0].change
            names = None if change is None else (_name(matches[0], change[0]), "tuned")
            found = measure_stack(matches, tensors, names)
        return [
            self._single(match, {name: tensor[n] for name, tensor in tensors.items()})
            if one is None
            else one
            for n, (match, one) in enumerate(zip(matches, found, strict=True))
        ]

    def _together(self, matches: Sequence[Match], tensors: Mapping[str, Tensor]) -> bool:
        from adaptkit.linalg.precision import works_on_stacks

        if not works_on_stacks(next(iter(tensors.values())).device):
            return False
        return likeness_of(matches[0], self.base, self.tuned) is not None

    def _single(self, match: Match, stored: dict[str, Tensor]) -> Numbers:
        try:
            numbers = _numbers(match, stored)
        except NotRepresentable as error:
            raise error.at(tensor=match.label) from None
        if not numbers.finite:
            raise self._non_finite(match, stored)
        return numbers

    def _non_finite(self, match: Match, stored: Mapping[str, Tensor]) -> NonFinite:
        what = "holds NaN or infinity"
        for n, side in enumerate(match.sides):
            for role, key in side.entry.tensors() if side.entry else ():
                if not finite(stored[f"{n}/{role}"]):
                    return NonFinite(what, file=side.given.adapter.source.path, tensor=key)
        for name, checkpoint, pieces in self._pieces(match):
            if not finite(stored[name]):
                return NonFinite(what, file=checkpoint.source.path, tensor=pieces[0].name)
        return NonFinite("ΔW overflows", tensor=match.label)


def _in_blocks(match: Match) -> bool:
    """Whether ΔW is formed in blocks of rows, not compared by thin factors and one w1 ⊗ w2."""
    sides = [side for side in match.sides if side.entry is not None and side.rank is None]
    kron = [side.entry is not None and side.entry.kind.kron for side in sides]
    based = match.change is not None or any(side.base is not None for side in match.sides)
    return based or not all(kron) or len(kron) > 1


def _read_of_base(match: Match) -> list[tuple[Piece, ...]]:
    """What is read of the base, once each."""
    pieces = [side.base for side in match.sides] + [match.change and match.change[0]]
    return [one for one in dict.fromkeys(pieces) if one is not None]


def _name(match: Match, pieces: tuple[Piece, ...]) -> str:
    """The name of pieces of the base among what was read: the same in every match of a stack."""
    return f"base{_read_of_base(match).index(pieces)}"


def _numbers(match: Match, stored: Mapping[str, Tensor]) -> Numbers:
    sides = [_operand(match, n, stored) for n in range(len(match.sides))]
    mine = None if match.mine is None else sides.pop(0)
    if match.change is not None:
        base, tuned = stored[_name(match, match.change[0])], stored["tuned"]
        ours = None if mine is None else mine.form
        return measure(ours, None if same(base, tuned) else difference(tuned, base))
    if mine is None:
        return sum((measure(None, side.form) for side in sides if side is not None), Numbers())
    if len(sides) < 2:
        return _pair(mine, sides[0] if sides else None, None)
    total, start = Numbers(), 0
    for side, other in zip(match.theirs, sides, strict=True):
        total += _pair(mine, other, (start, start + side.rows))
        start += side.rows
    return total


def _operand(match: Match, n: int, stored: Mapping[str, Tensor]) -> _Operand | None:
    side = match.sides[n]
    if side.entry is None:
        return None
    found = {role: stored[f"{n}/{role}"] for role, _ in side.entry.tensors()}
    return _Operand(
        side,
        side.entry,
        match.label,
        found,
        None if side.base is None else stored[_name(match, side.base)],
    )


def _pair(mine: _Operand, other: _Operand | None, rows: tuple[int, int] | None) -> Numbers:
    """Measure A and B on these rows of A (None: all rows)."""
    if other is None:
        return measure(mine.rows(rows), None)
    if mine.equal(other, rows):
        size = measure(mine.rows(rows), None).a if mine.known else 0.0
        return Numbers(size, size, size, known=mine.known)
    if not (mine.finite and other.finite):
        # NaN takes precedence over a missing base
        return Numbers(error=math.nan)
    return measure(mine.rows(rows), other.form)


@dataclass
class _Operand:
    """A side whose tensors have been read."""

    side: Side
    entry: Entry
    label: str
    stored: Mapping[str, Tensor]
    base: Tensor | None

    @cached_property
    def finite(self) -> bool:
        return all(map(finite, self.stored.values()))

    @property
    def known(self) -> bool:
        """Return whether ΔW can be computed."""
        return self.entry.kind.additive or self.base is not None

    @cached_property
    def weights(self) -> Weights:
        """Return the decoded weights in float64, rows as stored.

        A full difference keeps its dtype, since it is as large as the weight.
        """
        tensors = dict(self.stored) if self.entry.kind.dense else widened(self.stored)
        return self.entry.kind.decode(tensors, self.entry.facts)

    @cached_property
    def form(self) -> Difference:
        """Return ΔW."""
        if not self.known:
            raise needs_base(self.entry, self.label)
        swapped, strength = self.entry.swapped, self.side.given.strength
        if self.base is None:
            size = self.entry.facts.rows, self.entry.facts.columns
            whole = form(self.weights, strength, size, thin=self.side.rank is not None)
        else:
            whole = applied(self.weights, exchanged(self.base) if swapped else self.base, strength)
        whole = whole.exchanged() if swapped else whole
        return whole if self.side.cut is None else whole.cut(*self.side.cut)

    def rows(self, rows: tuple[int, int] | None) -> Difference:
        """Return these rows of ΔW (None: all)."""
        return self.form if rows is None else self.form.cut(*rows)

    def equal(self, other: _Operand, rows: tuple[int, int] | None) -> bool:
        """Return whether these rows and the other side hold the same numbers."""
        if self.side.given.strength != other.side.given.strength:
            return False
        try:
            return alike(self._part(rows), other._part(other.side.cut))
        except NotRepresentable:
            # cannot be cut there
            return False

    def _part(self, rows: tuple[int, int] | None) -> Weights:
        weights = self.weights.swapped() if self.entry.swapped else self.weights
        return weights if rows is None else weights.part(*rows)
