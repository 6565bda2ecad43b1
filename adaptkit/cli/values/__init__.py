"""Values of the command line: paths, sizes, strengths, names, and what a shell completes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.files.hub import local
from adaptkit.ops.shared import SIZES, parse_size, split_strength

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from click.shell_completion import CompletionItem

__all__ = [
    "EXTRACTABLE",
    "FACTOR",
    "HOST",
    "INPUT",
    "PATH",
    "SIZE",
    "STRENGTH",
    "Size",
    "complete_algorithms",
    "complete_families",
    "complete_formats",
]

PATH = click.Path(path_type=Path)


class Input(click.Path):
    """A path, or `hf://owner/repo/file`, which is read through the cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        found = super().convert(value, param, ctx)
        return local(found.decode() if isinstance(found, bytes) else found)


INPUT = Input(path_type=Path)


def _named(names: Iterable[str], start: str) -> list[CompletionItem]:
    """The names that a shell offers after a start."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in names if name.startswith(start.lower())]


def complete_formats(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    """The key formats that begin so."""
    from adaptkit.detect import formats

    return _named(formats(), start)


def complete_families(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    """The model families that begin so."""
    from adaptkit.detect import families

    return _named(families(), start)


def complete_algorithms(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    """The algorithms that begin so and can be written from ΔW."""
    from adaptkit.keymap.kinds import extractable

    return _named(extractable(), start)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes: `500KB`, `64MB`, `1.5GB` (powers of 1000) or `64MiB` (of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        size = parse_size(value)
        if size is None:
            self.fail(f"invalid size {value!r}; expected a size such as {SIZES}", param, ctx)
        return size


class Strength(click.ParamType):  # type: ignore[type-arg]
    """`style.safetensors:0.8`: a path and the strength of the adapter in it."""

    name = "adapter[:strength]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        return value if isinstance(value, tuple) else split_strength(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return click.Path().shell_complete(ctx, param, incomplete)


class Factor(click.ParamType):  # type: ignore[type-arg]
    """An integer of at least 1, or `auto` (None)."""

    name = "factor"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or isinstance(value, int) or value == "auto":
            return value if isinstance(value, int) else None
        if not value.isdecimal() or int(value) < 1:
            self.fail(
                f"invalid factor {value!r}; expected an integer of at least 1, or auto", param, ctx
            )
        return int(value)


class Registered(click.ParamType):  # type: ignore[type-arg]
    """A name from a registry, which is read when the option is used or shown."""

    def __init__(
        self,
        name: str,
        names: Callable[[], Iterable[str]],
        also: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.name, self.names, self.also = name, names, also

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names())}]"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return _named(self.names(), incomplete)

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"Choose from {', '.join(self.names())}."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = list(self.names())
        wanted = str(value).strip().lower()
        found = wanted if wanted in names else self.also().get(wanted)
        if found is None:
            near = get_close_matches(wanted, [*names, *self.also()], n=1, cutoff=0.6)
            listed = ", ".join(map(repr, names))
            more = f" Did you mean {near[0]}?" if near else ""
            self.fail(f"{value!r} is not one of {listed}.{more}", param, ctx)
        return found


class Algorithm(Registered):
    """A name that the command itself checks, with the nearest names in its message."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join(self.names())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


def _hosts() -> Iterable[str]:
    from adaptkit.hosts import hosts

    return hosts()


def _called() -> Mapping[str, str]:
    from adaptkit.hosts import hosts

    return {other: name for name, host in hosts().items() for other in host.also}


def _extractable() -> Iterable[str]:
    from adaptkit.keymap.kinds import extractable

    return (*extractable(), "auto")


HOST = Registered("host", _hosts, _called)
EXTRACTABLE = Algorithm("algorithm", _extractable)
FACTOR = Factor()
SIZE = Size()
STRENGTH = Strength()
