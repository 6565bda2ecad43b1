"""Match key templates with free indices in one dictionary look-up."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from adaptkit.names import tokenise

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["FIELD", "Templates", "fill"]


P = TypeVar("P")


FIELD = re.compile(r"\{(\w+)(?::(\d+))?\}")


class Templates(Generic[P]):
    """Templates with free indices (`layers.{i:12}.fc{n}`), matched by their skeleton.

    The skeleton is the string with every run of digits replaced by `#`.
    """

    def __init__(self) -> None:
        self._tables: dict[str, dict[tuple[int, ...], dict[tuple[int, ...], _Entry[P]]]] = {}

    def add(self, template: str, payload: P, joiner: str = ".") -> None:
        """Register a template with words joined by `joiner`; TypeError for a second meaning."""
        if "{" in template:
            skeleton, positions, values, free = _compiled(template)
        else:
            skeleton, values = tokenise(template)
            positions, free = tuple(range(len(values))), ()
        if joiner != ".":
            skeleton = skeleton.replace(".", joiner)
        table = self._tables.setdefault(skeleton, {}).setdefault(positions, {})
        # if two namings share a name, its first reading wins
        entry = table.get(values)
        if entry is None:
            table[values] = _Entry(payload, free)
        elif entry.payload is not payload and entry.payload != payload:
            raise TypeError(f"{template!r} means both {entry.payload} and {payload}")

    def match(self, text: str) -> tuple[P, dict[str, int]] | None:
        """Find the payload of the template that gives `text`, and its free indices."""
        skeleton, numbers = tokenise(text)
        # templates of one skeleton may fix different integers: `a.{i}.0` and `a.0.{i}`
        for positions, table in self._tables.get(skeleton, {}).items():
            entry = table.get(tuple(numbers[p] for p in positions))
            if entry is not None and (indices := entry.indices(numbers)) is not None:
                return entry.payload, indices
        return None


_Free = tuple[tuple[int, str, int | None], ...]  # (position, index name, bound)


class _Entry(NamedTuple, Generic[P]):
    payload: P
    free: _Free

    def indices(self, numbers: tuple[int, ...]) -> dict[str, int] | None:
        found: dict[str, int] = {}
        for position, name, bound in self.free:
            value = numbers[position]
            if (bound is not None and value >= bound) or found.setdefault(name, value) != value:
                return None
        return found


@lru_cache(maxsize=16384)
def _compiled(template: str) -> tuple[str, tuple[int, ...], tuple[int, ...], _Free]:
    """Compile to (skeleton, positions and values of fixed integers, free indices).

    Cached, because families share most of their templates.
    """
    shapes: list[str] = []
    positions: list[int] = []
    fixed: list[int] = []
    free: list[tuple[int, str, int | None]] = []
    # literal, name, bound, literal, …
    pieces = FIELD.split(template)
    for n in range(0, len(pieces), 3):
        shape, numbers = tokenise(pieces[n])
        first = len(fixed) + len(free)
        positions.extend(range(first, first + len(numbers)))
        fixed.extend(numbers)
        shapes.append(shape)
        if n + 1 < len(pieces):
            name, bound = pieces[n + 1 : n + 3]
            free.append((len(fixed) + len(free), name, int(bound) if bound else None))
    return "#".join(shapes), tuple(positions), tuple(fixed), tuple(free)


def fill(template: str, indices: Mapping[str, int]) -> str:
    """Replace the free indices of a template by numbers."""
    if not indices:
        return template
    return FIELD.sub(lambda found: str(indices[found[1]]), template)
