"""Suggest known keys for an unknown one."""

from __future__ import annotations

import itertools
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

from adaptkit.keymap import prefixes, split_suffix
from adaptkit.names import tokenise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptkit.keymap import KeyMap

__all__ = ["nearest"]

CUTOFF = 0.75  # difflib ratio; names below this have little in common


def nearest(keys: KeyMap, key: str) -> str | None:
    """The most similar known key with the numbers of `key`, or None.

    Names are compared without their numbers. A known module with a strange suffix has no nearer
    name.
    """
    if any(keys.claims(key[:at]) for at, letter in enumerate(key) if letter == "."):
        return None
    found = split_suffix(key)
    stem, suffix = (
        (found[0], found[1]) if found else (key.rpartition(".")[0], key.rpartition(".")[2])
    )
    shape, numbers = tokenise(stem)
    match = get_close_matches(shape, _shapes(keys), n=1, cutoff=CUTOFF)
    # an equal shape means that only a number is out of range: no other name to suggest
    if not match or match[0] == shape:
        return None
    holes = match[0].count("#")
    values = itertools.chain(map(str, numbers), itertools.repeat("0"))
    parts = match[0].split("#")
    named = "".join(part + next(values) if n < holes else part for n, part in enumerate(parts))
    return f"{named}.{suffix}"


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
