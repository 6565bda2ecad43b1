"""adaptkit convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import HOST, PATH, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("adapter", type=PATH)
@click.option("--to", metavar="FORMAT", help="Key format to write; `adaptkit formats` lists them.")
@click.option(
    "--for",
    "host",
    type=HOST,
    help="Write what this host really loads for this family.",
)
@recasts
@ranks
@writer
def convert(
    adapter: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any
) -> None:
    """Write ADAPTER in another key format, every key accounted for.

    Keys are renamed and their tensors copied byte for byte. Where the formats cut layers differently, fused projections
    are split or parts fused, exactly. Where the new format has no place for alpha, it is multiplied into the weights, and
    the report says for how many modules and with what error. A key that would be lost fails the run.

    --algo changes the algorithm too: exactly where that is possible, else to the nearest weights, with the error reported;
    one of the rank rules cuts the rank on the way.

    \b
    adaptkit convert style.safetensors --to comfy
    adaptkit convert style.safetensors --for diffusers -o style-diffusers.safetensors
    adaptkit convert style.safetensors --to peft -o style-peft
    adaptkit convert lokr.safetensors --to diffusers --algo lora --rank 32
    """
    from adaptkit.cli.show.rewrite import converted
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import convert as op

    if chosen["to"] and chosen["host"]:
        raise click.UsageError("--to and --for exclude each other")
    if not (chosen["to"] or chosen["host"] or chosen["algo"] or chosen["dtype"] != "keep"):
        raise click.UsageError("say what to write: --to FORMAT or --for HOST")
    talk = Talk("convert", as_json, quiet, verbose)
    plan = op.plan(adapter, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("converting") as progress:
        report = op.run(plan, progress)
    converted(talk, report)
