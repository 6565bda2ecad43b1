"""adaptkit extract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import EXTRACTABLE, FACTOR, HOST, INPUT, complete_formats, ranks, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=INPUT)
@click.argument("tuned", type=INPUT)
@click.option(
    "--algo",
    default="lora",
    show_default=True,
    type=EXTRACTABLE,
    help="Algorithm of the adapter.",
)
@ranks
@click.option(
    "--factor",
    type=FACTOR,
    metavar="N|auto",
    help="LoKr: size of the small factor.  [default: auto, the detected factor or 8]",
)
@click.option(
    "--decompose-both",
    is_flag=True,
    help="LoKr: also decompose the small factor, at the same rank.",
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
    help="LoRA: clamp factors to this quantile as kohya's script does (0.99); less accurate.",
)
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=complete_formats,
    help="Key format to write; `adaptkit formats` lists them.  [default: the one that most hosts "
    "load completely]",
)
@click.option("--for", "host", type=HOST, help="Write the format that this host loads.")
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    default="auto",
    show_default=True,
    help="auto is within 0.1 % of the optimum; exact is far slower.",
)
@click.option(
    "--vectors/--no-vectors",
    default=None,
    help="Store changed biases and norms exactly; some hosts ignore them.  [default: only with "
    "--algo full]",
)
@click.option("--ema", is_flag=True, help="Read the averaged (EMA) weights of a checkpoint.")
@writer
def extract(base: Path, tuned: Path, **chosen: Any) -> None:
    """Extract the adapter that turns BASE into TUNED.

    BASE and TUNED are checkpoints of one model family. Each is a .safetensors or .ckpt file, an
    index of shards or a diffusers folder, in any precision including fp8. Equal layers are left
    out. The report gives the share of the difference that the adapter captures, per layer and in
    total, measured on the stored numbers.

    Without a rank rule a LoRA has rank 32, and the second factor of a LoKr is not decomposed.

    \b
    adaptkit extract base.ckpt tuned.ckpt                          a LoRA of rank 32
    adaptkit extract base.ckpt tuned.ckpt --rank 64 --conv-rank 16
    adaptkit extract base.ckpt tuned.ckpt --algo lokr --factor 16
    adaptkit extract base.ckpt tuned.ckpt --algo auto --size 64MB  the best for each layer
    """
    from adaptkit.cli.show.extract import extracted
    from adaptkit.cli.show.talk import write
    from adaptkit.ops.extract import VERB

    write(VERB, "extracting", extracted, base, tuned, **chosen)
