"""adaptkit compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, SIZE, STRENGTH, inputs, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("a", type=STRENGTH, metavar="A[:STRENGTH]")
@click.argument("b", type=STRENGTH, metavar="B[:STRENGTH]")
@click.option(
    "--base",
    type=PATH,
    help="Checkpoint that the adapters are for, or that checkpoint B was made from.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="T",
    help="Exit 1 if the relative error is larger.",
)
@inputs
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Where to compute.",
)
@click.option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    help="Bound on working memory, torch not counted.  [default: 560MB, or what one layer needs]",
)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Only these modules or components, by A's names (repeatable).",
)
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Not these modules or components, likewise."
)
@talk
def compare(
    a: tuple[Path, float],
    b: tuple[Path, float],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **chosen: Any,
) -> int:
    """Say how far adapter A is from adapter B, or how much of adapter A checkpoint B contains.

    The formats and algorithms of two adapters may differ. The relative error is ‖A − B‖ / ‖B‖ of what they change, in
    float64; modules that only one of them has count in full. DoRA, OFT and other kinds that depend on the weights need
    --base, unless their tensors are equal.

    With a checkpoint, --base is the one it was made from, and D is what they differ by: the report says at which strength
    the adapter stands in D, and how much of D it is.

    \b
    adaptkit compare style.safetensors style-lokr.safetensors --tolerance 0.1
    adaptkit compare style.safetensors:0.8 other.safetensors
    adaptkit compare style.safetensors merged.safetensors --base base.safetensors
    """
    from adaptkit.cli.show.compare import compared
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import compare as op

    said = Talk("compare", as_json, quiet, verbose)
    plan = op.plan(a, b, op.Options(**chosen))
    with said.progress("comparing") as progress:
        report = op.run(plan, progress)
    compared(said, report)
    return 1 if report.exceeded else 0
