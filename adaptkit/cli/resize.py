"""adaptkit resize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("adapter", type=PATH)
@ranks
@recasts
@writer
def resize(
    adapter: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any
) -> None:
    """Cut the rank of ADAPTER, as exactly as that rank allows.

    Give one rule: a rank, an error, a file size, or what other tools know as dynamic methods. --error and --size choose
    the ranks of all modules together, which at the same size loses less than one rank everywhere. Everything is computed from
    the factors in float64: the result is the optimum, in seconds. A LoKr stays a LoKr; LoHa and full differences become LoRA;
    a DoRA keeps its magnitudes.

    \b
    adaptkit resize style.safetensors --rank 16
    adaptkit resize style.safetensors --size 64MB
    adaptkit resize style.safetensors --error 0.05
    """
    from adaptkit.cli.show.rewrite import resized
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import resize as op

    talk = Talk("resize", as_json, quiet, verbose)
    plan = op.plan(adapter, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("resizing") as progress:
        report = op.run(plan, progress)
    resized(talk, report)
