"""adaptkit batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import NO_LIMITS, PATH, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("recipe", type=PATH, metavar="RECIPE.toml")
@click.option(
    "--jobs",
    type=click.IntRange(0),
    metavar="N",
    help="Number of worker processes; 0 runs all jobs in this process.  [default: 1, or the number "
    "of CPUs of a Ray cluster]",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run on this machine, or on a Ray cluster with a shared file system (needs "
    "adaptkit[ray]).",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Address of the Ray cluster.  [default: RAY_ADDRESS, a running local cluster, or a new "
    "one]",
)
@click.option("--keep-going", is_flag=True, help="Continue with the other jobs if one fails.")
@click.option("--dry-run", is_flag=True, help="Print the plan of all jobs and write nothing.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Also replace existing outputs that this recipe did not write.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End a job that takes longer; it fails, and the others go on with --keep-going.",
)
@click.option(
    "--allow-outside",
    is_flag=True,
    help="Let outputs lie outside the folder of the recipe.",
)
@NO_LIMITS
@talk
def batch(
    recipe: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any
) -> int:
    """Run the jobs of RECIPE.toml.

    Jobs are merges, extractions, conversions, resizes and combinations. A [[job]] is one command
    with its inputs and options. In a [[matrix]] values may be lists, and every combination is a
    job. [defaults] and [defaults.COMMAND] hold default values. Options are those of the commands,
    with _ for -. Paths are relative to the folder of the recipe. Outputs are named by templates.

    \b
    [[matrix]]
    command = "merge"
    bases = ["sd15.safetensors", "anime.safetensors"]
    adapters = "loras/*.safetensors"
    strengths = [0.4, 0.8]
    output = "merged/{base}-{adapter}-{strength}.safetensors"

    RECIPE.toml.log.jsonl records the finished jobs. A job is skipped if its inputs (by content),
    its options and its output have not changed since; so the same command resumes an interrupted
    batch and repeats the jobs that changed. The first failure ends the batch unless --keep-going
    is given. A summary names the failed jobs.

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
