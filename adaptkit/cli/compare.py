"""adaptkit compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import ALPHA_IN, INPUT, STRENGTH, computing, inputs, selecting, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("a", type=STRENGTH, metavar="A[:STRENGTH]")
@click.argument("b", type=STRENGTH, metavar="B[:STRENGTH]")
@click.option(
    "--base",
    type=INPUT,
    help="Checkpoint of the adapters, or the one that checkpoint B was made from.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="T",
    help="Exit with 1 if the relative error is larger.",
)
@inputs
@ALPHA_IN
@computing
@selecting
@talk
def compare(
    a: tuple[Path, float],
    b: tuple[Path, float],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **chosen: Any,
) -> int:
    """Compare adapters, checkpoints, or one with the other.

    Two adapters may differ in format and algorithm. Their relative error is ‖A − B‖ / ‖B‖,
    computed in float64; a module of only one adapter counts in full. DoRA, OFT and other
    algorithms that depend on the weights need --base, unless the tensors are equal.

    Two checkpoints of one family may differ in layout and number format; a layer of only one counts
    in full.

    If only B is a checkpoint, --base must be the checkpoint that it was made from. The report gives
    the strength of the adapter in their difference D, and its share of D.

    --only and --skip take module names as A spells them.

    \b
    adaptkit compare style.safetensors style-lokr.safetensors --tolerance 0.1
    adaptkit compare style.safetensors:0.8 other.safetensors
    adaptkit compare tuned.safetensors base.safetensors
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
