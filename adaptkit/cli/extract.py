"""adaptkit extract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option("--algo", default="lora", show_default=True, metavar="lora|lokr|full", help="Kind of adapter to fit.")
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="Rank everywhere, clipped to what a layer allows.  [default: lora 32, lokr full]",
)
@click.option("--conv-rank", type=click.IntRange(1), help="Rank of convolutions larger than 1×1.  [default: as --rank]")
@click.option("--factor", type=click.IntRange(1), default=8, show_default=True, help="LoKr: size of the small factor.")
@click.option(
    "--to", default="kohya", show_default=True, metavar="FORMAT", help="Key format to write; see `adaptkit formats`."
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
@writer
def extract(base: Path, tuned: Path, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **chosen: Any) -> None:
    """Write the adapter that turns checkpoint BASE into checkpoint TUNED.

    BASE and TUNED are checkpoints of one model family, each a .safetensors or .ckpt file, an index of shards or a
    diffusers folder. Layers that do not differ are left out. The report says which share of the difference the adapter
    captures, per layer and in total, measured on the numbers as they are stored.

    \b
    adaptkit extract base.ckpt tuned.ckpt                          a LoRA of rank 32
    adaptkit extract base.ckpt tuned.ckpt --rank 64 --conv-rank 16
    adaptkit extract base.ckpt tuned.ckpt --algo lokr --factor 16
    """
    from adaptkit.cli.render import Talk
    from adaptkit.ops import extract as op

    talk = Talk("extract", as_json, quiet, verbose)
    plan = op.plan(base, tuned, op.Options(**chosen))
    if dry_run:
        talk.plan(plan.to_dict())
        return
    with talk.progress("extracting") as progress:
        report = op.run(plan, progress)
    talk.extracted(report)
