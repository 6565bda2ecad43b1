"""Options that commands share, and the parameter types they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adaptkit.ops.ranks.options import rules
from adaptkit.ops.shared import split_strength

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptkit.ops.ranks.rules.contract import Rule

__all__ = [
    "EXTRACTABLE",
    "FACTOR",
    "HOST",
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
            self.fail(f"invalid size {value!r}; write 500KB, 64MB, 1.5GB or 64MiB", param, ctx)
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
            self.fail(f"invalid factor {value!r}; expected a number >= 1, or auto", param, ctx)
        return int(value)


class Registered(click.ParamType):  # type: ignore[type-arg]
    """A name from a registry, which is read when the option is used or shown."""

    def __init__(self, name: str, names: Callable[[], Iterable[str]]) -> None:
        self.name, self.names = name, names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names())}]"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"Choose from {', '.join(self.names())}."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = list(self.names())
        if value not in names:
            listed = ", ".join(map(repr, names))
            self.fail(f"{value!r} is not one of {listed}.", param, ctx)
        return str(value)


class Algorithm(Registered):
    """A name that the command itself checks, with the nearest names in its message."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join(self.names())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


def _hosts() -> Iterable[str]:
    from adaptkit.hosts import hosts

    return hosts()


def _extractable() -> Iterable[str]:
    from adaptkit.kinds import extractable

    return (*extractable(), "auto")


HOST = Registered("host", _hosts)
EXTRACTABLE = Algorithm("algorithm", _extractable)
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


def ranks(function: F) -> F:
    """An option for every rank rule, --conv-rank and --max-rank."""
    conv = click.option(
        "--conv-rank",
        type=click.IntRange(1),
        help="Rank of convolutions larger than 1×1, with --rank.",
    )
    most = click.option(
        "--max-rank",
        type=click.IntRange(1),
        help="No module gets a higher rank, whatever the rule.",
    )
    first, *others = (_rule(rule) for rule in rules().values())
    return _apply(function, [first, conv, *others, most])


def _rule(rule: Rule) -> Callable[[F], F]:
    """The option of a rank rule."""
    kind: Any = SIZE
    if rule.kind is int and not rule.bytes:
        low, high = (None if n is None else int(n) for n in (rule.low, rule.high))
        kind = click.IntRange(low, high)
    elif not rule.bytes:
        kind = click.FloatRange(rule.low, rule.high, min_open=rule.above)
    name = f"--{rule.name.replace('_', '-')}"
    return click.option(name, type=kind, metavar=rule.metavar, help=rule.help)


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
