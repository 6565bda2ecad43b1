"""Options that commands share, and the parameter types they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adaptkit.ops.shared import split_strength

__all__ = [
    "FACTOR",
    "PATH",
    "SIZE",
    "STRENGTH",
    "Size",
    "inputs",
    "ranks",
    "recasts",
    "talk",
    "writer",
]

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

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        return value if isinstance(value, tuple) else split_strength(value)


class Factor(click.ParamType):  # type: ignore[type-arg]
    """A number from 1 on, or `auto` (None)."""

    name = "factor"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or isinstance(value, int) or value == "auto":
            return value if isinstance(value, int) else None
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is no factor; write a number from 1 on, or auto", param, ctx)
        return int(value)


FACTOR = Factor()
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
            click.option(
                "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
            ),
            click.option(
                "-q", "--quiet", is_flag=True, help="No progress, no summary; errors only."
            ),
            click.option("-v", "--verbose", is_flag=True, help="One line per module as well."),
        ],
    )


def inputs(function: F) -> F:
    """--family, --format: override detection."""
    return _apply(
        function,
        [
            click.option(
                "--family", metavar="NAME", help="Model family, where detection should not decide."
            ),
            click.option(
                "--format", metavar="NAME", help="Key format of the input adapter, likewise."
            ),
        ],
    )


SHARE = click.FloatRange(0.0, 1.0, min_open=True)


def ranks(function: F) -> F:
    """Which ranks to keep: one of the rules."""
    return _apply(
        function,
        [
            click.option(
                "--rank",
                type=click.IntRange(1),
                help="This rank everywhere, as far as a layer allows.",
            ),
            click.option(
                "--conv-rank",
                type=click.IntRange(1),
                help="Rank of convolutions larger than 1×1, with --rank.",
            ),
            click.option(
                "--energy",
                type=SHARE,
                metavar="E",
                help="The least rank per module keeping this share of ‖ΔW‖².",
            ),
            click.option(
                "--error",
                type=click.FloatRange(0.0, 1.0),
                metavar="E",
                help="The smallest file with a relative error of at most E over the whole adapter.",
            ),
            click.option(
                "--size",
                type=SIZE,
                metavar="SIZE",
                help="The least error in a file of at most SIZE.",
            ),
            click.option(
                "--sv-ratio",
                type=click.FloatRange(1.0),
                metavar="R",
                help="Keep σᵢ ≥ σ₁ / R, per module.",
            ),
            click.option(
                "--sv-fro",
                type=SHARE,
                metavar="F",
                help="Keep √(Σ kept σ² / Σ σ²) ≥ F, per module.",
            ),
            click.option(
                "--sv-cumulative",
                type=SHARE,
                metavar="C",
                help="Keep Σ kept σ / Σ σ ≥ C, per module.",
            ),
            click.option(
                "--max-rank",
                type=click.IntRange(1),
                help="No module gets a higher rank, whatever the rule.",
            ),
        ],
    )


def recasts(function: F) -> F:
    """--algo, --factor and --base of the commands that write adapters anew."""
    return _apply(
        function,
        [
            click.option("--algo", metavar="NAME", help="Change the algorithm: lora, lokr, full."),
            click.option(
                "--factor",
                type=click.IntRange(1),
                default=8,
                show_default=True,
                help="Size of the small factor, where something becomes a LoKr.",
            ),
            click.option(
                "--base",
                type=PATH,
                metavar="CHECKPOINT",
                help="The model it was trained on: for DoRA, OFT and others whose change depends on it.",
            ),
        ],
    )


def writer(function: F) -> F:
    """What every command that writes accepts."""
    return _apply(
        function,
        [
            click.option(
                "-o",
                "--output",
                type=PATH,
                help="File to write; without it, beside the last input.",
            ),
            inputs,
            click.option(
                "--dtype",
                type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
                default="keep",
                show_default=True,
                help="Number format of what is written.",
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                metavar="auto|cpu|cuda|cuda:N",
                help="Where to compute.",
            ),
            click.option(
                "--memory",
                type=SIZE,
                metavar="SIZE",
                help="Bound on working memory, torch not counted.  [default: 560MB, or what one layer needs]",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Only these modules or components (repeatable).",
            ),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Not these modules or components (repeatable).",
            ),
            click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            click.option(
                "--allow-unused",
                is_flag=True,
                help="Go on where keys would be lost; the report lists them.",
            ),
            talk,
        ],
    )
