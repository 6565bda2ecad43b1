"""Map an adapter's entries to the slots of another format.

Slots are renamed, split or fused. Reads headers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from adaptkit.entries import as_part
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from fractions import Fraction

    from adaptkit.adapter import Adapter
    from adaptkit.entries import Entry
    from adaptkit.keymap import KeyMap
    from adaptkit.names import Rows, Slot, Target

    Span = tuple[Fraction, Fraction]

__all__ = ["Assembly", "Part", "Respelling", "placed"]


class Part(NamedTuple):
    """One entry's contribution to a slot: all rows, or those of `cut`.

    A part without an entry is `rows` rows of zeros.
    """

    entry: Entry | None
    cut: tuple[int, int] | None = None
    rows: int = 0


class Assembly(NamedTuple):
    """One slot of the output and its parts, in row order."""

    slot: Slot
    parts: tuple[Part, ...]
    adapter: Adapter

    @property
    def label(self) -> str:
        """The display name, taken from the entry if the slot holds exactly one."""
        only = self.whole
        return self.adapter.label(self.slot if only is None else only.slot)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries to read for this slot."""
        return tuple(part.entry for part in self.parts if part.entry is not None)

    @property
    def whole(self) -> Entry | None:
        """The entry that this slot holds unchanged, or None."""
        first = self.parts[0]
        return first.entry if len(self.parts) == 1 and first.cut is None else None


class Respelling:
    """Finds a format's slots for an adapter's entries.

    `lost` lists the keys without a slot, `dropped` their entries.
    """

    def __init__(self, adapter: Adapter, keys: KeyMap) -> None:
        self.adapter, self.keys = adapter, keys
        self.lost: dict[str, str] = {}
        self.dropped: list[Entry] = []

    def jobs(self, entries: Mapping[Slot, Entry]) -> Iterator[Assembly]:
        """Every slot to write, in the order of the file; fills `lost`."""
        held: dict[Target, dict[Slot, Entry]] = {}
        for slot, entry in entries.items():
            held.setdefault(slot.target, {})[slot] = entry
        for target, parts in held.items():
            yield from self._target(target, parts)

    def _target(self, target: Target, held: Mapping[Slot, Entry]) -> Iterator[Assembly]:
        used: set[Slot] = set()
        for slot in self.keys.slots(target):
            found = self._parts(slot, held)
            if found:
                used.update(part.entry.slot for part in found if part.entry is not None)
                yield Assembly(slot, found, self.adapter)
        for slot, entry in held.items():
            if slot not in used:
                name = self.adapter.label(slot)
                reason = f"the {self.keys.format.name} format has no place for {name}"
                self.lost |= dict.fromkeys(entry.keys.values(), reason)
                self.dropped.append(entry)

    def _parts(self, slot: Slot, held: Mapping[Slot, Entry]) -> tuple[Part, ...]:
        """The parts of a slot.

        Its entry, rows of a larger one, or smaller ones and their gaps.
        """
        if slot in held:
            return (Part(held[slot]),)
        # spans are exact fractions: thirds of a fused qkv have no exact float
        want = _span(slot.rows)
        for theirs, entry in held.items():
            have = _span(theirs.rows)
            if have[0] <= want[0] and want[1] <= have[1]:
                return (Part(entry, self._cut(entry, have, want)),)
        inside = sorted(
            (_span(t.rows), e) for t, e in held.items() if want[0] <= _span(t.rows)[0] < want[1]
        )
        return tuple(self._joined(want, inside)) if inside else ()

    def _cut(self, entry: Entry, have: Span, want: Span) -> tuple[int, int]:
        """The rows of an entry that a slot takes."""
        height = self._height(entry, have)
        return (
            self._row(entry, height * (want[0] - have[0])),
            self._row(entry, height * (want[1] - have[0])),
        )

    def _joined(self, want: Span, inside: Sequence[tuple[Span, Entry]]) -> Iterator[Part]:
        (first, entry), at = inside[0], want[0]
        height = self._height(entry, first)
        for (start, stop), member in inside:
            if start > at:
                yield Part(None, rows=self._row(member, height * (start - at)))
            yield Part(member)
            at = stop
        if at < want[1]:
            yield Part(None, rows=self._row(entry, height * (want[1] - at)))

    def _height(self, entry: Entry, span: Span) -> Fraction:
        """The number of rows of the whole target."""
        if not entry.facts.rows:
            raise NotRepresentable(
                f"the tensors of a {entry.kind.name} do not determine its rows, "
                "so it cannot be split or fused",
                hint="--algo lora with --base CHECKPOINT can; or merge it into that checkpoint",
                tensor=self.adapter.label(entry.slot),
            )
        return entry.facts.rows / (span[1] - span[0])

    def _row(self, entry: Entry, place: Fraction) -> int:
        if place.denominator != 1:
            raise NotRepresentable(
                f"{entry.facts.rows} rows do not divide into the parts of this layer",
                tensor=self.adapter.label(entry.slot),
            )
        return int(place)


def placed(entries: Mapping[Slot, Entry], keys: KeyMap) -> Mapping[Slot, Entry]:
    """Entries of one expert alone, where a format has a place for one expert only.

    Files of Wan 2.2 do not say which expert they are for, except in diffusers.
    """
    parts = {slot.component for slot in entries}
    if len(parts) != 1:
        return entries
    (part,) = parts
    if keys.writes(keys.family.component(part)):
        return entries
    others = (
        name for name in keys.family.experts(part) if keys.writes(keys.family.component(name))
    )
    other = next(others, None)
    return entries if other is None else as_part(entries, other)


def _span(rows: Rows | None) -> Span:
    from fractions import Fraction  # takes 3 ms, which a pure renaming does not need

    if rows is None:
        return Fraction(0), Fraction(1)
    return Fraction(rows.start, rows.total), Fraction(rows.stop, rows.total)
