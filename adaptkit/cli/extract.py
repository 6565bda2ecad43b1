"""adaptkit extract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import EXTRACTABLE, FACTOR, PATH, ranks, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option(
    "--algo",
    default="lora",
    show_default=True,
    type=EXTRACTABLE,
    help="Kind of adapter to fit.",
)
@ranks
@click.option(
    "--factor",
    type=FACTOR,
    metavar="N|auto",
    help="LoKr: size of the small factor.  [default: auto, the one it was made with, else 8]",
)
@click.option(
    "--decompose-both",
    is_flag=True,
    help="LoKr: the first factor as a product too, of the same rank.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    help="LoRA: alpha to store.  [default: the rank]",
)
@click.option(
    "--clamp-quantile",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="Q",
    help="LoRA: clamp factors to this quantile, as kohya's script does (0.99); it costs accuracy.",
)
@click.option(
    "--to",
    default="kohya",
    show_default=True,
    metavar="FORMAT",
    help="Key format to write; see `adaptkit formats`.",
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    default="auto",
    show_default=True,
    help="auto is within 0.1 % of the optimum; exact takes far longer.",
)
@click.option(
    "--vectors/--no-vectors",
    default=None,
    help="Carry changed biases and norms, exactly; not every host reads them.  [default: with --algo full only]",
)
@click.option(
    "--ema", is_flag=True, help="Read the averaged weights where a checkpoint holds them too."
)
@writer
def extract(
    base: Path, tuned: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any
) -> None:
    """Write the adapter that turns checkpoint BASE into checkpoint TUNED.

    BASE and TUNED are checkpoints of one model family, each a .safetensors or .ckpt file, an index of shards or a
    diffusers folder, in any mix, fp8 included. Layers that do not differ are left out. The report says which share of the
    difference the adapter captures, per layer and in total, measured on the numbers as they are stored.

    Without a rank rule a LoRA has rank 32, and the second factor of a LoKr is full.

    \b
    adaptkit extract base.ckpt tuned.ckpt                          a LoRA of rank 32
    adaptkit extract base.ckpt tuned.ckpt --rank 64 --conv-rank 16
    adaptkit extract base.ckpt tuned.ckpt --algo lokr --factor 16
    adaptkit extract base.ckpt tuned.ckpt --algo auto --size 64MB  the best for each layer
    """
    from adaptkit.cli.show.extract import extracted
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import extract as op

    talk = Talk("extract", as_json, quiet, verbose)
    plan = op.plan(base, tuned, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("extracting") as progress:
        report = op.run(plan, progress)
    extracted(talk, report)
