"""Verbs: commands that read adapters or checkpoints and write one output.

Every module of `adaptkit.ops` that defines `VERB` is a verb. `batch` runs verbs by this table.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from adaptkit.errors import InternalError, NoSuchName
from adaptkit.ops.stages import log, logged
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from adaptkit.ops.stages import Progress

__all__ = ["STRENGTH", "Verb", "verb", "verbs"]

# the one input that is not a file: the factor of an adapter's ΔW
STRENGTH = "strength"


@dataclass(frozen=True)
class Verb:
    """A verb and its functions.

    `inputs` names the positional arguments of `plan`. A verb with the input `strength` takes its
    adapters as (path, strength) pairs. `together` runs several plans on one base in one pass.
    """

    name: str
    inputs: tuple[str, ...]
    options: type[Any]
    plan: Callable[..., Any]
    run: Callable[..., Any]
    together: Callable[..., Any] | None = None

    def perform(self, plan: Any, progress: Progress | None = None) -> Any:
        """Run a plan; what is done is logged at INFO."""
        try:
            with logged(self.name, progress) as told:
                report = self.run(plan, told)
        except Exception as error:
            if (fault := InternalError.of_torch(error)) is not None:
                raise fault from error
            raise
        log().info("%s: wrote %s, %d bytes", self.name, report.output, report.bytes)
        return report

    @property
    def weighs(self) -> bool:
        """Whether each adapter has a strength."""
        return STRENGTH in self.inputs

    @cached_property
    def kinds(self) -> dict[str, Any]:
        """Map every option that is not an input to the type of its value, without None."""
        hints = get_type_hints(self.options)
        names = [field.name for field in fields(self.options) if field.name not in self.inputs]
        return {name: _given(hints[name]) for name in names}

    def default(self, option: str) -> Any:
        """Return the default value of an option."""
        (found,) = (field for field in fields(self.options) if field.name == option)
        return None if found.default is MISSING else found.default


def _given(hint: Any) -> Any:
    """Return `int` for `int | None`."""
    if get_origin(hint) is not UnionType:
        return hint
    (kind,) = (one for one in get_args(hint) if one is not NoneType)
    return kind


def verbs() -> Mapping[str, Verb]:
    """Return every verb by name."""
    return discover("adaptkit.ops", "VERB", required=False)


def verb(name: str) -> Verb:
    """Return one verb; raise NoSuchName with the nearest names."""
    found = verbs()
    if name not in found:
        raise NoSuchName.among("command", name, found)
    return found[name]
