"""Limits of what a file may ask for, each with a name.

The work and the memory that a file costs are linear in its bytes up to these limits. A file beyond
one is refused by an error that states it. The owner of an odd file lifts them all, with
`--no-limits` or the environment variable ADAPTKIT_NO_LIMITS.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import OverLimit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["LIMITS", "VARIABLE", "Limit", "allow", "lifted", "read_json", "watched", "within"]

VARIABLE = "ADAPTKIT_NO_LIMITS"
HINT = "--no-limits reads a file of your own that is so on purpose"


class Limit(NamedTuple):
    """The most that is read, its unit, and what it counts or what is added to it."""

    most: int
    unit: str
    note: str = ""


# the bytes of a header are bounded as in the safetensors library, with or without these
LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "keys": Limit(500_000, "tensors"),
        "key length": Limit(1000, "characters in a tensor's name"),
        "dimensions": Limit(64, "dimensions"),
        "metadata": Limit(10_000, "entries of metadata"),
        "JSON size": Limit(32_000_000, "bytes of JSON", "an index, a configuration, one value"),
        "JSON depth": Limit(64, "levels of nested JSON"),
        "digits": Limit(400, "digits in a number"),
        "pickle size": Limit(32 << 20, "bytes of pickle", "the catalogue, not the weights"),
        "pickle steps": Limit(10_000, "opcodes", "and one more for every two bytes"),
        "packed pickle": Limit(1 << 20, "bytes of unpacked pickle", "and a fourth of the file"),
        "packed weights": Limit(32 << 20, "bytes of unpacked weights", "and 20 times the file"),
        "expanded views": Limit(1 << 30, "bytes of expanded views", "beyond their storages"),
        "patterns": Limit(10_000, "patterns of module names"),
        "pattern length": Limit(1000, "characters in a pattern"),
        "pattern steps": Limit(500_000, "steps to match patterns", "for all modules"),
        "configured count": Limit(10_000, "ranks or steps", "one number of a configuration"),
    }
)


def lifted() -> bool:
    """Whether the user has lifted the limits."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@contextmanager
def allow(everything: bool = True) -> Iterator[None]:
    """Lift the limits inside the block, here and in the processes that it starts."""
    before = os.environ.get(VARIABLE)
    if everything:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


_watch: ContextVar[dict[str, tuple[int, int]] | None] = ContextVar("watch", default=None)


@contextmanager
def watched() -> Iterator[Mapping[str, tuple[int, int]]]:
    """What is asked for inside the block, and the most, by limit: the nearest of each."""
    found: dict[str, tuple[int, int]] = {}
    token = _watch.set(found)
    try:
        yield found
    finally:
        _watch.reset(token)


def within(name: str, found: int, *, beyond: int = 0, tensor: str | None = None) -> None:
    """Raise `OverLimit` if `found` exceeds the limit of a name, to which `beyond` is added."""
    limit = LIMITS[name]
    most = limit.most + beyond
    if (watch := _watch.get()) is not None:
        held = watch.get(name)
        if held is None or found * held[1] > held[0] * most:
            watch[name] = found, most
    if found > most and not lifted():
        what = f"{found:,} {limit.unit} are more than the limit {name!r} of {most:,}"
        raise OverLimit(what, hint=HINT, tensor=tensor)


_MARKS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def read_json(text: str | bytes, what: str) -> Any:
    """Parse JSON within the limits of size, depth and digits.

    Raises `OverLimit`, or ValueError for what is not JSON. `what` names the text in errors.
    """
    within("JSON size", len(text))
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    # brackets are counted much faster than they are matched
    if text.count("[") + text.count("{") > LIMITS["JSON depth"].most // 2:
        within("JSON depth", _depth(text))
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise OverLimit(f"{what} is nested too deep to be read") from None


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside strings."""
    depth = most = 0
    for mark in _MARKS.finditer(text):
        first = text[mark.start()]
        if first in "[{":
            depth += 1
            if depth > most:  # noqa: PLR1730 (`max` takes twice as long)
                most = depth
        elif first != '"':
            depth -= 1
    return most


def _integer(text: str) -> int:
    within("digits", len(text))
    return int(text)
