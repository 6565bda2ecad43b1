"""Suggest known keys for an unknown one."""

from __future__ import annotations

import itertools
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

from adaptkit.keymap import prefixes, split_suffix
from adaptkit.names import tokenise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from adaptkit.keymap import KeyMap

__all__ = ["CUTOFF", "MISSPELT", "nearest"]

SMALL = (0, 1, 2)  # text encoders count from 1, blocks from 0
TRIED = 1000  # fillings of a shape, at most
CUTOFF = 0.75  # difflib ratio; names below this have little in common
MISSPELT = 0.92  # names above this differ in a letter or two


def nearest(keys: KeyMap, key: str, cutoff: float = CUTOFF) -> str | None:
    """The most similar known key with the numbers of `key`, or None: never one that is not known.

    `cutoff` is the least difflib ratio of their stems. Names are compared without their numbers. A
    known module with a strange suffix has no nearer name.
    """
    if any(keys.claims(key[:at]) for at, letter in enumerate(key) if letter == "."):
        return None
    found = split_suffix(key)
    stem, suffix = (
        (found[0], found[1]) if found else (key.rpartition(".")[0], key.rpartition(".")[2])
    )
    shape, numbers = tokenise(stem)
    match = get_close_matches(shape, _shapes(keys), n=1, cutoff=cutoff)
    # an equal shape means that only a number is out of range: no other name to suggest
    if not match or match[0] == shape:
        return None
    named = next((one for one in _filled(match[0], numbers) if keys.claims(one)), None)
    return None if named is None else f"{named}.{suffix}"


def _filled(shape: str, numbers: Sequence[int]) -> Iterator[str]:
    """The names of a shape with these numbers in their order; those that are missing are small."""
    parts = shape.split("#")
    holes = len(parts) - 1
    if len(numbers) >= holes:
        fillings: Iterable[Iterable[int]] = itertools.combinations(numbers, holes)
    else:
        fillings = (
            _merged(places, numbers, small)
            for places in reversed([*itertools.combinations(range(holes), len(numbers))])
            for small in itertools.product(SMALL, repeat=holes - len(numbers))
        )
    for values in itertools.islice(fillings, TRIED):
        yield "".join(map("".join, zip(parts, [*map(str, values), ""], strict=True)))


def _merged(places: Sequence[int], numbers: Sequence[int], small: Sequence[int]) -> list[int]:
    """`numbers` in their places, and the small ones in the others."""
    rest, given = iter(small), dict(zip(places, numbers, strict=True))
    return [given[n] if n in given else next(rest) for n in range(len(numbers) + len(small))]


@lru_cache(maxsize=8)
def _shapes(keys: KeyMap) -> tuple[str, ...]:
    """Every stem of a key map, without numbers."""
    return tuple(dict.fromkeys(_stems(keys)))


def _stems(keys: KeyMap) -> Iterator[str]:
    for part in keys.family.components:
        for prefix in prefixes(part, keys.format)[:1]:
            for row in part.rows:
                for names in row.names.values():
                    for name in names:
                        module = name.module.replace(".", keys.format.joiner)
                        yield tokenise(prefix + _numbered(module))[0]


def _numbered(template: str) -> str:
    """A template with its free indices set to zero."""
    head, brace, rest = template.partition("{")
    return head if not brace else head + "0" + _numbered(rest.partition("}")[2])
