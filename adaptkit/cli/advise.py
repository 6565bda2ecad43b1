"""adaptkit advise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import (
    DTYPE,
    FAMILY,
    INPUT,
    NO_LIMITS,
    complete_formats,
    computing,
    picture,
    selecting,
    talk,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=INPUT)
@click.argument("tuned", type=INPUT)
@click.option(
    "--max-rank",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Highest rank in the table.",
)
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=complete_formats,
    help="Key format of the adapter; `adaptkit formats` lists them.  [default: that of extract]",
)
@picture("the tables")
@FAMILY
@DTYPE
@computing
@selecting
@click.option("--ema", is_flag=True, help="Read the averaged (EMA) weights of a checkpoint.")
@click.option(
    "--allow-unused",
    is_flag=True,
    help="Continue even if layers have no counterpart; the report lists them.",
)
@NO_LIMITS
@talk
def advise(
    base: Path,
    tuned: Path,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **chosen: Any,
) -> None:
    """Compare adapters for the difference of two checkpoints.

    BASE and TUNED are checkpoints as for extract. The tables list algorithms, ranks, file sizes
    and errors. Nothing is written.

    For a range of file sizes, the first table gives the error of a LoRA of one rank
    (extract --rank), of a LoRA of the same size with chosen ranks (--size), and of the best
    algorithm for each layer (--algo auto). The second table gives the error of a LoKr for each
    factor, next to a LoRA of the same size. The last lines recommend a command, and say what it
    will lose.

    \b
    adaptkit advise base.safetensors tuned.safetensors
    adaptkit advise base.safetensors tuned.safetensors --plot advice.png
    """
    from adaptkit.cli.show.advise import advised
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import advise as op

    if plot is not None:
        from adaptkit.cli.show.picture import check

        check(plot, overwrite)
    said = Talk("advise", as_json, quiet, verbose)
    plan = op.plan(base, tuned, op.Options(**chosen))
    with said.progress("measuring") as progress:
        report = op.run(plan, progress)
    advised(said, report, base, tuned)
    if plot is not None:
        from adaptkit.cli.show.plot_advise import draw

        draw(report, f"{tuned.name} − {base.name}", plot, overwrite)
        if not quiet:
            click.echo(f"wrote {plot}", err=True)
