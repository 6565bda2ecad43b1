"""adaptkit combine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import STRENGTH, complete_formats, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ("sum", "mean", "ties", "dare", "dare-ties", "magnitude")


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=STRENGTH, metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=complete_formats,
    help="Key format to write.  [default: that of the first adapter]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="sum",
    show_default=True,
    help="sum is exact; mean divides it by the weights and keeps the rank; the others keep a share "
    "of the entries of each ΔW.",
)
@click.option(
    "--decay",
    type=float,
    metavar="D",
    help="With --method mean: the moving average of checkpoints of one training, in their order.",
)
@click.option(
    "--density",
    type=float,
    metavar="D",
    help="Share of the entries to keep, above 0 and at most 1.  [default: 0.5]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed of dare and dare-ties."
)
@click.option(
    "--into",
    callback=lambda _, __, names: tuple(names.split(",")) if names else (),
    metavar="PART,PART",
    help="The component that each adapter is for, in their order: transformer,transformer_2 "
    "puts the two experts of Wan 2.2 in one file.",
)
@ranks
@recasts
@writer
def combine(adapters: tuple[tuple[Path, float], ...], **chosen: Any) -> None:
    """Combine adapters into their weighted sum.

    ΔW of the output is the weighted sum of the ΔW of all adapters. They may differ in rank,
    algorithm and key format, but must be of one model family. The weight of an adapter follows
    its last colon (a.safetensors:0.5, b.safetensors:-1) and defaults to 1; a weight of 0.5 halves
    the effect.

    Without a rank rule the sum is exact and its rank is the sum of the ranks. With a rank rule
    the sum is truncated optimally, and the report gives the error.

    \b
    adaptkit combine style.safetensors:0.7 face.safetensors:0.5 -o both.safetensors
    adaptkit combine a.safetensors b.safetensors:-1 --rank 32
    adaptkit combine a.safetensors b.safetensors --method ties --density 0.3 --rank 32
    adaptkit combine epoch-8.safetensors epoch-9.safetensors epoch-10.safetensors --method mean
    """
    from adaptkit.cli.show.rewrite import combined
    from adaptkit.cli.show.talk import write
    from adaptkit.ops.combine import VERB

    shown = [(str(path), weight) for path, weight in adapters]
    write(VERB, "combining", partial(combined, inputs=shown), adapters, **chosen)
