"""Options that several commands share, and their parameter types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adaptkit.cli.values import (
    EXTRACTABLE,
    FACTOR,
    HOST,
    INPUT,
    PATH,
    SIZE,
    STRENGTH,
    Size,
    complete_algorithms,
    complete_families,
    complete_formats,
)
from adaptkit.files.limits import allow

if TYPE_CHECKING:
    from pathlib import Path

    from adaptkit.ops.ranks.rules.contract import Rule

__all__ = [
    "DTYPE",
    "EXTRACTABLE",
    "FACTOR",
    "FAMILY",
    "HOST",
    "INPUT",
    "NO_LIMITS",
    "PATH",
    "SIZE",
    "STRENGTH",
    "SUFFIX",
    "Size",
    "complete_formats",
    "computing",
    "inputs",
    "picture",
    "ranks",
    "recasts",
    "selecting",
    "talk",
    "writer",
]

F = TypeVar("F", bound=Callable[..., Any])


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def _lift(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    """Lift the limits of files until the command has ended."""
    if given:
        context.with_resource(allow())


FAMILY = click.option(
    "--family",
    metavar="NAME",
    shell_complete=complete_families,
    help="Override the detected model family.",
)
NO_LIMITS = click.option(
    "--no-limits",
    is_flag=True,
    expose_value=False,
    callback=_lift,
    help="Read files beyond the limits that `adaptkit help untrusted-files` lists.",
)


def _logged(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Log until the program ends, so that its error is in the log too."""
    if path is not None:
        from adaptkit.cli.show.live.log import logging_to

        context.find_root().with_resource(logging_to(path))


def talk(function: F) -> F:
    """Add --json, -q, -v and --log-file."""
    return _apply(
        function,
        [
            click.option(
                "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
            ),
            click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
            click.option("-v", "--verbose", is_flag=True, help="Also print one line per module."),
            click.option(
                "--log-file",
                type=PATH,
                expose_value=False,
                callback=_logged,
                help="Append what is done, with the time of every stage, to a file.",
            ),
        ],
    )


def inputs(function: F) -> F:
    """Add --family, --format and --no-limits."""
    return _apply(
        function,
        [
            FAMILY,
            click.option(
                "--format",
                metavar="NAME",
                shell_complete=complete_formats,
                help="Override the detected key format of the input.",
            ),
            NO_LIMITS,
        ],
    )


ALPHA_IN = click.option(
    "--alpha-in",
    metavar="VALUE|as-rank",
    help="Alpha of every input module, whatever the file says; as-rank means a scale of 1.",
)


def computing(function: F) -> F:
    """Add --device and --memory."""
    return _apply(
        function,
        [
            click.option(
                "--device",
                default="auto",
                show_default=True,
                metavar="auto|cpu|cuda|cuda:N",
                help="Device to compute on.",
            ),
            click.option(
                "--memory",
                type=SIZE,
                metavar="SIZE",
                help="Limit working memory, not counting torch itself.  [default: 280MB for each "
                "core, at most a quarter of what is free and at least 560MB; more if the largest "
                "layer needs it]",
            ),
        ],
    )


def selecting(function: F) -> F:
    """Add --only and --skip."""
    return _apply(
        function,
        [
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Process only these modules or components (repeatable).",
            ),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Leave out these modules or components (repeatable).",
            ),
        ],
    )


def ranks(function: F) -> F:
    """Add the rank rules, of which a user gives one."""
    # commands without ranks need not read the rules
    from adaptkit.ops.ranks.options import rules

    conv = click.option(
        "--conv-rank",
        type=click.IntRange(1),
        help="With --rank: rank of convolutions larger than 1×1.",
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


BLOCKS = click.option(
    "--blocks",
    multiple=True,
    metavar="NAME=WEIGHT,…",
    help="Multiply the strength in some blocks; NAME is a name, a glob or a range (repeatable).",
)


def recasts(function: F) -> F:
    """Add --algo, --factor, --base, --alpha-in and --blocks."""
    return _apply(
        function,
        [
            ALPHA_IN,
            BLOCKS,
            click.option(
                "--algo",
                metavar="NAME",
                shell_complete=complete_algorithms,
                help="Change the algorithm: lora, lokr, full.",
            ),
            click.option(
                "--factor",
                type=click.IntRange(1),
                default=8,
                show_default=True,
                help="Size of the small factor of a new LoKr.",
            ),
            click.option(
                "--base",
                type=INPUT,
                metavar="CHECKPOINT",
                help="Checkpoint of the adapter; DoRA, OFT and others depend on its weights.",
            ),
        ],
    )


def _checked_picture(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    if path is None:
        return None
    from adaptkit.cli.show.picture import option

    return option(context, parameter, path)


def picture(what: str) -> Callable[[F], F]:
    """Add --plot and --overwrite; `what` names the content of the picture."""

    def added(function: F) -> F:
        return _apply(
            function,
            [
                click.option(
                    "--plot",
                    type=PATH,
                    callback=_checked_picture,
                    help=f"Draw {what} as a .png, .svg or .html file (needs adaptkit[plot]).",
                ),
                click.option(
                    "--overwrite", is_flag=True, help="Replace an existing picture, page or card."
                ),
            ],
        )

    return added


SUFFIX = click.option(
    "--suffix",
    default="",
    metavar="TEXT",
    help="Several inputs: add -TEXT to every name.",
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
    default="keep",
    show_default=True,
    help="Number format of the output.",
)


def writer(function: F) -> F:
    """Add the options of every command that writes."""
    return _apply(
        function,
        [
            click.option(
                "-o",
                "--output",
                type=PATH,
                help="File to write, or the folder for several inputs.  [default: next to the last "
                "input]",
            ),
            inputs,
            DTYPE,
            computing,
            selecting,
            click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
            click.option(
                "--verify",
                is_flag=True,
                help="Read the values of the output back and compare them with what was meant.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            click.option(
                "--allow-unused",
                is_flag=True,
                help="Continue even if keys would be lost; the report lists them.",
            ),
            talk,
        ],
    )
