"""Values of a recipe: the keys of each command, and their conversion to its Options."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.files.hub import is_address
from adaptkit.ops.shared import DTYPES, SIZES, parse_size, split_strength
from adaptkit.ops.verb import verb

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ["Reader", "Rooted", "check_known", "inside", "names_of", "nearest"]

# options in bytes: a recipe writes them as the command line does
IN_BYTES = ("memory", "size", "shard_size")
CHOICES = {"dtype": ("keep", *DTYPES), "svd": ("auto", "exact")}


def names_of(command: str) -> set[str]:
    """Return every key that a job of this command may have."""
    found = verb(command)
    return {*found.inputs, *found.kinds}


def nearest(kind: str, name: str, known: Iterable[str], place: str) -> NoSuchName:
    """Return the error for an unknown name at its place in the recipe."""
    error = NoSuchName.among(kind, name, known)
    return NoSuchName(f"{place}: {error.message}", hint=error.hint)


def check_known(name: str, known: Collection[str], place: str) -> None:
    """Refuse an unknown option and suggest the nearest ones."""
    if name not in known:
        raise nearest("option", name, known, place)


class Rooted(str):
    """A path from a glob, which needs no folder."""

    __slots__ = ()


def inside(root: Path, text: str) -> Path:
    """Resolve a path of a recipe relative to its folder; expand `~`, fetch what is on a hub."""
    if is_address(text):
        path, strength = split_strength(text)
        return path if strength == 1.0 else Path(f"{path}:{strength!r}")
    if isinstance(text, Rooted):
        return Path(text)
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:
        raise WrongUsage(f"{text!r} is in no known home folder", hint="write it in full") from None
    return Path(os.path.normpath(root / expanded))


@dataclass(frozen=True)
class Reader:
    """Read the values of one job; raise WrongUsage with job and option for wrong types."""

    root: Path
    place: str
    command: str

    def option(self, name: str, value: Any) -> Any:
        """Convert a value as Options requires: sizes in bytes, paths resolved, lists as tuples."""
        if name in IN_BYTES and isinstance(value, str):
            return self._size(name, value)
        if name == "factor" and value == "auto" and verb(self.command).default(name) is None:
            return None
        kinds: dict[Any, Callable[[str, Any], Any]] = {
            int: self._whole,
            float: self.number,
            bool: self._truth,
            str: self._choice,
            Path: self.path,
            tuple[str, ...]: self._texts,
        }
        return kinds[verb(self.command).kinds[name]](name, value)

    def wrong(self, name: str, wanted: str, value: Any) -> WrongUsage:
        """Return the error for a wrong value."""
        shown = (
            f'"{value}"'
            if isinstance(value, str)
            else str(value).lower()
            if isinstance(value, bool)
            else value
        )
        several = isinstance(value, list) and self.place.startswith("[[job]]")
        hint = "in a [[matrix]] a list makes several jobs" if several else None
        return WrongUsage(f"{self.place}: {name} must be {wanted}, got {shown}", hint=hint)

    def text(self, name: str, value: Any) -> str:
        """Read a string that is not empty."""
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "a string", value)
        return value

    def path(self, name: str, value: Any) -> Path:
        """Read a path, relative to the recipe's folder."""
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "a path", value)
        return inside(self.root, value)

    def number(self, name: str, value: Any) -> float:
        """Read a finite number."""
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise self.wrong(name, "a number", value)
        return float(value)

    def _choice(self, name: str, value: Any) -> str:
        text = self.text(name, value)
        if name in CHOICES and text not in CHOICES[name]:
            raise self.wrong(name, "one of " + ", ".join(CHOICES[name]), value)
        return text

    def _texts(self, name: str, value: Any) -> tuple[str, ...]:
        """Read a list of strings; a single string is a list of one."""
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise self.wrong(name, "a list of strings", value)
        return tuple(items)

    def _whole(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(
                name, "a size such as 64MB" if name in IN_BYTES else "an integer", value
            )
        return value

    def _truth(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def _size(self, name: str, text: str) -> int:
        size = parse_size(text)
        if size is None:
            raise self.wrong(name, f"a size such as {SIZES}", text)
        return size
