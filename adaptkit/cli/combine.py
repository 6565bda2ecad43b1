"""adaptkit combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import STRENGTH, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ("sum", "ties", "dare", "dare-ties", "magnitude")


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=STRENGTH, metavar="ADAPTER[:WEIGHT]...")
@click.option("--to", metavar="FORMAT", help="Key format to write.  [default: that of the first]")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="sum",
    show_default=True,
    help="sum is exact; the others keep a share of the entries of each ΔW.",
)
@click.option(
    "--density", type=float, metavar="D", help="That share, above 0 and at most 1.  [default: 0.5]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which entries dare drops.")
@ranks
@recasts
@writer
def combine(
    adapters: tuple[tuple[Path, float], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Make one adapter of several: ΔW is the sum of weight · ΔW of each.

    The adapters may differ in rank, algorithm and key format, but are of one family. A weight stands after the last colon
    (a.safetensors:0.5, b.safetensors:-1) and is 1 otherwise; 0.5 means half the effect. Without a rank rule the sum is exact
    and ranks add up; with one it is cut to the optimum and the error reported.

    \b
    adaptkit combine style.safetensors:0.7 face.safetensors:0.5 -o both.safetensors
    adaptkit combine a.safetensors b.safetensors:-1 --rank 32
    adaptkit combine a.safetensors b.safetensors --method ties --density 0.3 --rank 32
    """
    from adaptkit.cli.show.rewrite import combined
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import combine as op

    talk = Talk("combine", as_json, quiet, verbose)
    plan = op.plan(adapters, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("combining") as progress:
        report = op.run(plan, progress)
    combined(talk, report, [(str(path), weight) for path, weight in adapters])
