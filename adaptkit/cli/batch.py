"""adaptkit batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("recipe", type=PATH, metavar="RECIPE.toml")
@click.option(
    "--jobs",
    type=click.IntRange(0),
    metavar="N",
    help="So many jobs at once, each in a process of its own; 0: one after the other in this process. Default: 1, or as "
    "many as a Ray cluster has CPUs.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where: on this machine, or on a Ray cluster whose machines see the same files (needs adaptkit[ray]).",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Of the Ray cluster; without it RAY_ADDRESS, or the one that runs here, or a new one for this run.",
)
@click.option("--keep-going", is_flag=True, help="Go on with the other jobs where one fails.")
@click.option("--dry-run", is_flag=True, help="Print the plan of all jobs and write nothing.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace existing outputs that this recipe did not write, too.",
)
@talk
def batch(
    recipe: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any
) -> int:
    """Do the jobs of RECIPE.toml: merges, extractions, conversions, resizes and combinations.

    A [[job]] is one command with its inputs and options; in a [[matrix]] values may be lists, and every combination is a
    job. [defaults] and [defaults.COMMAND] fill in the rest. Options are those of the commands, with _ for -; paths count
    from the recipe's folder, and outputs are named by templates.

    \b
    [[matrix]]
    command = "merge"
    bases = ["sd15.safetensors", "anime.safetensors"]
    adapters = "loras/*.safetensors"
    strengths = [0.4, 0.8]
    output = "merged/{base}-{adapter}-{strength}.safetensors"

    What was done stands in RECIPE.toml.log.jsonl. A job whose inputs (by content), options and output are as they were then
    is skipped, so the same command goes on after an interrupt, and does again what changed. The first failure ends the
    batch unless --keep-going; a summary names those that failed.

    \b
    adaptkit batch recipe.toml --dry-run
    adaptkit batch recipe.toml --jobs 4 --keep-going
    """
    from adaptkit.cli.show.batch import Batched
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import batch as op

    said = Batched(Talk("batch", as_json, quiet, verbose))
    plan = op.plan(recipe, op.Options(**chosen))
    if dry_run:
        with said.talk.progress("planning") as progress:
            found = op.preview(plan, progress)
        return said.planned(found)
    try:
        with said.talk.progress("jobs") as progress:
            report = op.run(plan, progress, said.each)
    except KeyboardInterrupt:
        said.interrupted(len(plan.jobs))
        raise
    return said.finished(report)
