"""Options that commands share, and the parameter types they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adaptkit.ops._common import split_strength

__all__ = ["PATH", "SIZE", "STRENGTH", "Size", "inputs", "talk", "writer"]

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


class Size(click.ParamType):  # type: ignore[type-arg]
    """`500KB`, `64MB`, `1.5GB` (powers of 1000) or `64MiB` (of 1024), in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(value.strip())
        if found is None or (found.group(3) and not found.group(2)):
            self.fail(f"{value!r} is no size; write 500KB, 64MB, 1.5GB or 64MiB", param, ctx)
        number, unit, binary = found.groups()
        factor = _UNITS[unit.upper()]
        if binary:
            factor = 1024 ** list(_UNITS).index(unit.upper())
        return int(float(number) * factor)


class Strength(click.ParamType):  # type: ignore[type-arg]
    """`style.safetensors:0.8`: a path, and what its ΔW is multiplied by."""

    name = "adapter[:strength]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        return value if isinstance(value, tuple) else split_strength(value)


SIZE = Size()
STRENGTH = Strength()


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def talk(function: F) -> F:
    """--json, -q, -v."""
    return _apply(
        function,
        [
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
            click.option("-q", "--quiet", is_flag=True, help="No progress, no summary; errors only."),
            click.option("-v", "--verbose", is_flag=True, help="One line per module as well."),
        ],
    )


def inputs(function: F) -> F:
    """--family, --format: override detection."""
    return _apply(
        function,
        [
            click.option("--family", metavar="NAME", help="Model family, where detection should not decide."),
            click.option("--format", metavar="NAME", help="Key format of the input adapter, likewise."),
        ],
    )


def writer(function: F) -> F:
    """What every command that writes accepts."""
    return _apply(
        function,
        [
            click.option("-o", "--output", type=PATH, help="File to write; without it, beside the last input."),
            inputs,
            click.option(
                "--dtype",
                type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
                default="keep",
                show_default=True,
                help="Number format of what is written.",
            ),
            click.option(
                "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to compute."
            ),
            click.option(
                "--memory",
                type=SIZE,
                metavar="SIZE",
                help="Bound on working memory, torch not counted.  [default: 1GB]",
            ),
            click.option(
                "--only", multiple=True, metavar="GLOB", help="Only these modules or components (repeatable)."
            ),
            click.option("--skip", multiple=True, metavar="GLOB", help="Not these modules or components (repeatable)."),
            click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            click.option("--allow-unused", is_flag=True, help="Go on where keys would be lost; the report lists them."),
            talk,
        ],
    )
