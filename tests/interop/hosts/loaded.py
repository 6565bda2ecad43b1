"""What a host makes of a file: for every key stem, the place where its weights end up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from adaptkit.names import Rows, Slot, Target
from tests.interop.hosts.files import File, Part


class Place(NamedTuple):
    """Rows of a weight of the base model (None: all of them), perhaps with their halves swapped."""

    target: Target
    rows: Rows | None = None
    swapped: bool = False


class RefusedError(Exception):
    """The host loads nothing of this file."""


@dataclass(frozen=True)
class Loaded:
    """The modules that end up in the right place with the right values; all others are lost."""

    right: frozenset[str] = frozenset()
    refused: str = ""

    def lost(self, file: File) -> set[Slot]:
        return {part.slot for part in file.parts if part.stem not in self.right}


@dataclass
class Names:
    """The weights of a model in a host's memory, by name."""

    places: dict[str, Place] = field(default_factory=dict)

    def add(self, name: str, target: Target, rows: Rows | None, swapped: bool) -> None:
        # parts under one name are one layer
        known = self.places.get(name)
        self.places[name] = Place(target, None if known else rows, swapped)

    def __contains__(self, name: str) -> bool:
        return name in self.places


def same(part: Part, place: Place) -> bool:
    """Whether a module of a file belongs to this place, rows in the same order."""
    return (
        part.slot.target == place.target
        and _share(part.slot.rows) == _share(place.rows)
        and part.swapped == place.swapped
    )


def _share(rows: Rows | None) -> tuple[float, float]:
    return (0.0, 1.0) if rows is None else (rows.start / rows.total, rows.stop / rows.total)
