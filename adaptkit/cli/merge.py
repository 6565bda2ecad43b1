"""adaptkit merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, SIZE, STRENGTH, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=PATH)
@click.argument("adapters", nargs=-1, required=True, type=STRENGTH, metavar="ADAPTER[:STRENGTH]...")
@click.option(
    "--blocks",
    multiple=True,
    metavar="NAME=WEIGHT,…",
    help="Weights of blocks, by name, glob or range, or a vector as LoRA Block Weight takes it (repeatable).",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read the output back and check it against base + ΔW before it appears.",
)
@click.option(
    "--shard-size", type=SIZE, metavar="SIZE", help="Write a folder of shards of at most this size."
)
@click.option(
    "--layout",
    type=click.Choice(["single-file", "folder"]),
    help="Write one file with the original names, or a folder with diffusers', whichever BASE is.",
)
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

    BASE may be a file, an index of shards or a folder; the output is of the same kind, with the same file names, unless
    --layout asks for the other one: every weight is then renamed, cut or joined as the model's family does it, bit for
    bit. A folder gets weights only; its config.json files are those of any diffusers folder of the model. Weights stored
    as fp8, with or without scales, stay so unless --dtype says otherwise, and the report says what that costs.

    --blocks multiplies the strength in parts of the model: `te=0`, `unet.down_blocks.*=0.5`, `double.0-5=0.3`, `IN04=0`,
    or the 12, 17, 20 or 26 numbers (57 or 61 for FLUX) of the LoRA Block Weight extension. The last rule that matches
    counts, what none matches keeps its strength, and a rule that matches nothing is an error.

    \b
    adaptkit merge base.safetensors style.safetensors:0.8 detail.safetensors -o merged.safetensors
    adaptkit merge base.safetensors style.safetensors --blocks "te=0,unet.up_blocks.0-1=0.5" --verify
    """
    from adaptkit.cli.show.merge import merged
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import merge as op

    talk = Talk("merge", as_json, quiet, verbose)
    plan = op.plan(base, adapters, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("merging") as progress:
        report = op.run(plan, progress)
    merged(talk, report)
