"""A verb: a command that reads adapters or checkpoints and writes one output.

Each module of `adaptkit.ops` that defines `VERB` is one. `batch` runs verbs by this table.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from adaptkit.errors import NoSuchName
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["STRENGTH", "Verb", "verb", "verbs"]

STRENGTH = "strength"  # the input that is no file: what the ΔW of an adapter is multiplied by


@dataclass(frozen=True)
class Verb:
    """One verb.

    `inputs` names its positional inputs in the order of `plan`. A verb that takes `strength` gets
    its adapters as (path, strength) pairs. `together` runs several plans on one base in one pass.
    """

    name: str
    inputs: tuple[str, ...]
    options: type[Any]
    plan: Callable[..., Any]
    run: Callable[..., Any]
    together: Callable[..., Any] | None = None

    @property
    def weighs(self) -> bool:
        """Whether each adapter has a strength."""
        return STRENGTH in self.inputs

    @cached_property
    def kinds(self) -> dict[str, Any]:
        """Option → type of its value, without None; inputs of the same name left out."""
        hints = get_type_hints(self.options)
        names = [field.name for field in fields(self.options) if field.name not in self.inputs]
        return {name: _given(hints[name]) for name in names}

    def default(self, option: str) -> Any:
        """The value of an option that is not given."""
        (found,) = (field for field in fields(self.options) if field.name == option)
        return None if found.default is MISSING else found.default


def _given(hint: Any) -> Any:
    """`int | None` → int."""
    if get_origin(hint) is not UnionType:
        return hint
    (kind,) = (one for one in get_args(hint) if one is not NoneType)
    return kind


def verbs() -> Mapping[str, Verb]:
    """Every verb by name."""
    return discover("adaptkit.ops", "VERB", required=False)


def verb(name: str) -> Verb:
    """One verb; NoSuchName with the nearest names."""
    found = verbs()
    if name not in found:
        raise NoSuchName.among("command", name, found)
    return found[name]
