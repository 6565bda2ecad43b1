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
def resize(adapter: Path, **chosen: Any) -> None:
    """Truncate the ranks of ADAPTER with the least error.

    Give one rule: a rank, an error, a file size, or a dynamic method of other tools. --error and
    --size choose the ranks of all modules together, which loses less than one rank everywhere at
    the same size. Everything is computed from the factors in float64, so the result is the
    optimum and takes seconds. A LoKr stays a LoKr; LoHa and full differences become LoRA; a DoRA
    keeps its magnitudes.

    \b
    adaptkit resize style.safetensors --rank 16
    adaptkit resize style.safetensors --size 64MB
    adaptkit resize style.safetensors --error 0.05
    """
    from adaptkit.cli.show.rewrite import resized
    from adaptkit.cli.show.talk import write
    from adaptkit.ops.resize import VERB

    write(VERB, "resizing", resized, adapter, **chosen)
