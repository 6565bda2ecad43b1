"""adaptkit merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, STRENGTH, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=PATH)
@click.argument("adapters", nargs=-1, required=True, type=STRENGTH, metavar="ADAPTER[:STRENGTH]...")
@writer
def merge(
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Bake adapters into checkpoint BASE and write the merged checkpoint.

    Each adapter may carry a strength after its last colon (1 without one; negative subtracts). All adapters of a layer
    are added in float32 and rounded once; layers no adapter touches are copied byte for byte. An adapter module that
    finds no place in BASE fails the run.

    \b
    adaptkit merge base.safetensors style.safetensors:0.8 detail.safetensors -o merged.safetensors
    """
    from adaptkit.cli.render import Talk
    from adaptkit.ops import merge as op

    talk = Talk("merge", as_json, quiet, verbose)
    plan = op.plan(base, adapters, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("merging") as progress:
        report = op.run(plan, progress)
    talk.merged(report)
