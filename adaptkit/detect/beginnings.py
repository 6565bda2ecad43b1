"""The families whose names begin like a file's, found without compiling their tables."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from adaptkit.keymap import prefixes
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adaptkit.families.contract import Component, ModelFamily
    from adaptkit.formats.contract import KeyFormat

__all__ = ["beginning_of", "begun", "checkpoint_heads", "starts"]

_HEAD = re.compile(r"[^{\d]*")
_NUMBER = re.compile(r"\d+")


def _families() -> Mapping[str, ModelFamily]:
    return discover("adaptkit.families", "FAMILY")


def _formats() -> Mapping[str, KeyFormat]:
    return discover("adaptkit.formats", "FORMAT")


@cache
def _owners(format: str) -> Mapping[str, Sequence[tuple[str, Component]]]:
    """The families and components behind every prefix of a format.

    Few prefixes are many families'.
    """
    found: dict[str, list[tuple[str, Component]]] = {}
    for name, family in _families().items():
        for part in family.components:
            for start in prefixes(part, _formats()[format]):
                found.setdefault(start, []).append((name, part))
    return found


@cache
def starts(format: str) -> tuple[str, ...]:
    """Every prefix of a format, over all families."""
    return tuple(_owners(format))


# files of a folder begin alike; bounded, as a stranger's file may begin in any way
@lru_cache(maxsize=4096)
def begun(beginning: str, format: str) -> tuple[str, ...]:
    """The families that have names with this beginning in a format."""
    joiner, found = _formats()[format].joiner, set()
    for start, owners in _owners(format).items():
        # the prefix first: it rules out most components without their words
        if not beginning.startswith(start):
            continue
        for name, part in owners:
            if name not in found and beginning.startswith(_joined(part, joiner), len(start)):
                found.add(name)
    return tuple(name for name in _families() if name in found)


@cache
def beginning_of(format: str) -> Callable[[str], str]:
    """The part of a stem that holds every head it may have.

    Words end before their first number, so a head has the numbers of its prefix alone: stems that
    differ in the numbers of their blocks begin alike.
    """
    numbered = tuple(start for start in starts(format) if _NUMBER.search(start))
    plain = re.compile(r"\D*")

    def begins(stem: str) -> str:
        longest = 0
        if stem.startswith(numbered):
            longest = max(len(start) for start in numbered if stem.startswith(start))
        return stem[: plain.match(stem, longest).end()]  # type: ignore[union-attr]

    return begins


@cache
def _joined(part: Component, joiner: str) -> tuple[str, ...]:
    """The beginnings of a component's module names as a format joins them."""
    return tuple(word.replace(".", joiner) for word in _words(part))


@cache
def _words(part: Component) -> tuple[str, ...]:
    """The beginnings of a component's module names up to the first number.

    They rule out most families without compiling their tables.
    """
    found = (name.module for row in part.rows for names in row.names.values() for name in names)
    modules = {module.partition("{")[0]: None for module in found}
    # the pattern matches any string, if only at its start
    return tuple({_HEAD.match(module)[0]: None for module in modules})  # type: ignore[index]


@cache
def checkpoint_heads(family: str) -> tuple[str, ...]:
    """The beginnings of a family's checkpoint keys up to the first number."""
    found: dict[str, None] = {}
    for part in _families()[family].components:
        for start in chain.from_iterable(part.checkpoints.values()):
            found |= dict.fromkeys(start + word for word in _words(part))
    return tuple(found)
