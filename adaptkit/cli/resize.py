"""adaptkit resize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import INPUT, SUFFIX, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=INPUT, metavar="ADAPTER...")
@ranks
@recasts
@click.option(
    "--weigh",
    type=INPUT,
    metavar="CHECKPOINT",
    help="With --size: spend ranks by ‖ΔW‖ relative to each layer's own ‖W‖.",
)
@writer
@SUFFIX
def resize(adapters: tuple[Path, ...], **chosen: Any) -> int:
    """Truncate the ranks of adapters with the least error.

    Give one rule: a rank, an error, a file size, or a dynamic method of other tools. --error and
    --size choose the ranks of all modules together, which loses less than one rank everywhere at
    the same size. Everything is computed from the factors in float64, so the result is the
    optimum and takes seconds. A LoKr stays a LoKr; LoHa and full differences become LoRA; a DoRA
    keeps its magnitudes.

    Several files, folders or globs are written to the folder of -o under their names, or beside
    each input; one that fails stops no other, and the exit code is 1 then.

    \b
    adaptkit resize style.safetensors --rank 16
    adaptkit resize style.safetensors --size 64MB
    adaptkit resize style.safetensors --error 0.05
    adaptkit resize loras --size 64MB -o small
    """
    from adaptkit.cli.show.rewrite import resized
    from adaptkit.cli.show.talk import write_each
    from adaptkit.ops.resize import VERB

    return write_each(VERB, "resizing", resized, adapters, **chosen)
