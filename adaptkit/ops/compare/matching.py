"""Matching of modules: of two adapters, or of an adapter and two checkpoints (headers only)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable, ShapeMismatch
from adaptkit.keymap import KeyMap
from adaptkit.keymap.kinds import dense_kind
from adaptkit.names import Rows, Slot
from adaptkit.ops.difference.pairing import Pairing, Wanted
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import Brief, Shared, Unused
from adaptkit.respelling import Part, Respelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.entries import Entry
    from adaptkit.names import Target
    from adaptkit.ops.compare.inputs import Given

__all__ = ["Base", "Cuts", "Match", "Side", "of_adapters", "of_checkpoint"]

# share of the entries of ΔW: larger factors cost more than blocks of rows of ΔW
THIN = 0.5
_TWICE = "adapts rows that another module of this file also adapts"


@dataclass(frozen=True)
class Side:
    """One entry, or its rows `cut`, on one side of a match.

    `entry` is None if this side has nothing there. `rows` is the number of rows, 0 if unknown.
    `base` locates the weight that a non-additive algorithm changes. `rank` is the rank of thin
    factors.
    """

    given: Given
    entry: Entry | None
    rows: int
    cut: tuple[int, int] | None = None
    base: tuple[Piece, ...] | None = None
    rank: int | None = None


@dataclass(frozen=True, repr=False)
class Match(Brief):
    """One module on both sides.

    `mine` is A's side; `theirs` are B's sides in the order of the rows. `change` locates the
    module in the base and in the tuned checkpoint.
    """

    label: str
    mine: Side | None
    theirs: tuple[Side, ...] = ()
    change: tuple[tuple[Piece, ...], tuple[Piece, ...]] | None = None
    # position among the matches of a plan
    number: int = 0

    @property
    def both(self) -> bool:
        """Return whether both sides have the module."""
        return self.mine is not None and bool(self.theirs or self.change)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return all sides, A's first."""
        return self.theirs if self.mine is None else (self.mine, *self.theirs)


class Base:
    """The optional checkpoint that non-additive algorithms are applied to."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.checkpoint = checkpoint
        self.held = {} if checkpoint is None else checkpoint.targets()

    def side(self, given: Given, part: Part) -> Side:
        """Return the side of a part.

        Raise NotRepresentable if the base lacks the layer, ShapeMismatch if the shapes differ.
        """
        entry, cut = part.entry, part.cut
        if entry is None:
            return Side(given, None, part.rows)
        rows = entry.facts.rows if cut is None else cut[1] - cut[0]
        if not entry.kind.additive:
            return Side(given, entry, rows, cut, self._pieces(given.adapter, entry))
        rank, (height, width) = _rank(given.adapter, entry), _size(entry)
        thin = rank is not None and rank * (height + width) <= THIN * height * width
        return Side(given, entry, rows, cut, None, rank if thin else None)

    def _pieces(self, adapter: Adapter, entry: Entry) -> tuple[Piece, ...] | None:
        if self.checkpoint is None:
            return None
        label = adapter.label(entry.slot)
        pieces = self.checkpoint.locate(entry.slot, self.held.get(entry.slot.target, {}))
        if pieces is None:
            raise NotRepresentable(
                f"the base has no {label}, and ΔW of a {entry.kind.title} depends on it",
                hint="pass the adapter's checkpoint as --base, or leave the module out with --skip",
                file=self.checkpoint.source.path,
            )
        fits(self.checkpoint, adapter, entry, pieces)
        if (reason := self.checkpoint.refusal(piece.name for piece in pieces)) is not None:
            raise NotRepresentable(
                f"stored as {reason}, not as floats",
                hint="use an fp8, fp16, bf16 or fp32 checkpoint as --base",
                file=self.checkpoint.source.path,
                tensor=pieces[0].name,
            )
        return pieces


def fits(checkpoint: Checkpoint, adapter: Adapter, entry: Entry, pieces: tuple[Piece, ...]) -> None:
    """Raise ShapeMismatch unless an entry has the size of its layer."""
    checkpoint.check_size(pieces, _size(entry), adapter.label(entry.slot), adapter.source.path)


def check_size(
    adapter: Adapter, label: str, where: str, there: tuple[int, int], here: tuple[int, int]
) -> None:
    """Raise ShapeMismatch if two sizes differ; 0 is unknown and matches."""
    if any(one and other and one != other for one, other in zip(there, here, strict=True)):
        shown = ["{} × {}".format(*(n or "?" for n in size)) for size in (there, here)]
        raise ShapeMismatch(
            f"{label} is {shown[0]} in {where}, {shown[1]} in this adapter",
            hint="the files are for models of different sizes; see `adaptkit inspect --modules`",
            file=adapter.source.path,
        )


def _size(entry: Entry) -> tuple[int, int]:
    return entry.facts.rows, entry.facts.columns


def _rank(adapter: Adapter, entry: Entry) -> int | None:
    """Return the rank of the factors, for a product the product of the ranks."""
    shapes = {role: adapter.source.infos[key].shape for role, key in entry.tensors()}
    if {"w1", "w1_a"} & shapes.keys():
        return _side_rank(shapes, "w1") * _side_rank(shapes, "w2")
    return entry.facts.rank


def _side_rank(shapes: Mapping[str, tuple[int, ...]], side: str) -> int:
    whole = shapes.get(side)
    return shapes[f"{side}_b"][0] if whole is None else min(whole[0], math.prod(whole[1:]))


class Cuts(KeyMap):
    """A key map that splits targets as an adapter file does.

    Targets that are not in the file are split as its format does.

    `twice` lists the slots that are left out because another slot has the same rows.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter.family, adapter.format)
        self.adapter = adapter
        self.twice: list[Slot] = []
        self.held: dict[Target, list[Slot]] = {}
        for slot in sorted(adapter.entries, key=lambda slot: (_span(slot)[0], -_span(slot)[1])):
            mine = self.held.setdefault(slot.target, [])
            (self.twice if mine and _span(slot)[0] < _span(mine[-1])[1] else mine).append(slot)

    @property
    def twice_keys(self) -> list[str]:
        """Return the keys of the slots in `twice`."""
        return [key for slot in self.twice for key in self.adapter.entries[slot].keys.values()]

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the slots of a target in the order of the rows.

        They are the file's own slots, with slots for the rows between them.
        """
        usual, mine = super().slots(target), self.held.get(target)
        return usual if mine is None else tuple(sorted(self._with_gaps(mine, usual), key=_span))

    def _with_gaps(self, mine: Sequence[Slot], usual: Sequence[Slot]) -> Iterator[Slot]:
        at = Fraction(0)
        for slot in (*mine, None):
            start, stop = (Fraction(1), Fraction(1)) if slot is None else _span(slot)
            if start > at:
                named = [one for one in usual if at <= _span(one)[0] and _span(one)[1] <= start]
                whole = sum(_span(one)[1] - _span(one)[0] for one in named) == start - at
                yield from named if whole else [_gap(mine[0].target, at, start)]
            if slot is not None:
                yield slot
            at = stop


def _span(slot: Slot) -> tuple[Fraction, Fraction]:
    rows = slot.rows or Rows(0, 1, 1)
    return Fraction(rows.start, rows.total), Fraction(rows.stop, rows.total)


def _gap(target: Target, start: Fraction, stop: Fraction) -> Slot:
    total = math.lcm(start.denominator, stop.denominator)
    return Slot(target, Rows(int(start * total), int(stop * total), total))


# two adapters


def of_adapters(a: Given, b: Given, base: Base, select: Shared) -> tuple[list[Match], list[Unused]]:
    """Match every module of A, then the modules of B alone; return also the unused keys."""
    ours, theirs = a.adapter, b.adapter
    cuts, selected = Cuts(ours), Selection(select.only, select.skip, a.adapter.family)
    respelling = Respelling(theirs, cuts)
    shared = {slot: entry for slot, entry in theirs.entries.items() if slot.target in cuts.held}
    try:
        found = {one.slot: one for one in respelling.jobs(shared)}
    except NotRepresentable as error:
        raise error.at(file=theirs.source.path) from None
    matches = []
    for slot, entry in ours.entries.items():
        if slot not in cuts.twice and selected(slot, ours.label(slot)):
            parts = found[slot].parts if slot in found else ()
            sides = tuple(base.side(b, part) for part in parts)
            _check_sides(ours, entry, b, sides)
            matches.append(Match(ours.label(slot), base.side(a, Part(entry)), sides))
    only = [(one.label, slot, one.parts) for slot, one in found.items() if slot not in ours.entries]
    only += [
        (theirs.label(slot), slot, (Part(e),))
        for slot, e in theirs.entries.items()
        if slot not in shared
    ]
    for label, slot, parts in only:
        if selected(slot, label):
            matches.append(Match(label, None, tuple(base.side(b, part) for part in parts)))
    selected.check("these adapters")
    return matches, [*_unused(ours, cuts.twice_keys), *_unused(theirs, respelling.lost)]


def _check_sides(ours: Adapter, entry: Entry, b: Given, sides: Sequence[Side]) -> None:
    rows = sum(side.rows for side in sides) if all(side.rows for side in sides) else 0
    for side in sides:
        columns = 0 if side.entry is None else side.entry.facts.columns
        label = ours.label(entry.slot)
        check_size(b.adapter, label, ours.source.path.name, _size(entry), (rows, columns))


def _unused(adapter: Adapter, twice: Iterable[str]) -> Iterator[Unused]:
    """Yield the keys of a file that are not compared, with the reason."""
    name = adapter.source.path.name
    yield from (Unused(key, f"{name}: {reason}") for key, reason in adapter.unclaimed.items())
    yield from (Unused(key, f"{name}: {_TWICE}") for key in twice)
    yield from (Unused(key, f"{name}: does not belong to a module") for key in adapter.carried)


# an adapter and two checkpoints


def of_checkpoint(
    a: Given, checkpoints: tuple[Checkpoint, Checkpoint], select: Shared
) -> tuple[list[Match], list[Unused]]:
    """Match every layer of (base, tuned) with the adapter, then the modules of A alone."""
    base, tuned = checkpoints
    entries, cuts, there = a.adapter.entries, Cuts(a.adapter), Base(base)
    pairing = Pairing(base, tuned, cuts, Wanted(dense_kind().name, True, select))
    matches, met = [], set(cuts.twice)
    for pair in pairing.pairs():
        match = Match(pair.label, None, (), (pair.base, pair.tuned))
        entry = None if pair.slot is None or pair.slot in cuts.twice else entries.get(pair.slot)
        if entry is not None:
            fits(base, a.adapter, entry, pair.base)
            match = replace(match, mine=there.side(a, Part(entry)))
            met.add(entry.slot)
        matches.append(match)
    for slot, entry in entries.items():
        if slot not in met and pairing.selection(slot, base.label(slot)):
            matches.append(Match(base.label(slot), there.side(a, Part(entry))))
    pairing.selection.check("these files")
    return matches, [*_unused(a.adapter, cuts.twice_keys), *pairing.lost, *pairing.left]
