"""adaptkit advise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import PATH, SIZE, talk
from adaptkit.cli.show.picture import option

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option(
    "--max-rank",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="The highest rank to look at.",
)
@click.option(
    "--to",
    default="kohya",
    show_default=True,
    metavar="FORMAT",
    help="Key format that is meant; see `adaptkit formats`.",
)
@click.option(
    "--plot",
    type=PATH,
    callback=option,
    help="Draw it: a .png, .svg or .html file (needs adaptkit[plot]).",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing picture.")
@click.option("--family", metavar="NAME", help="Model family, where detection should not decide.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
    default="keep",
    show_default=True,
    help="Number format that would be written.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Where to compute.",
)
@click.option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    help="Bound on working memory, torch not counted.  [default: 560MB, or what one layer needs]",
)
@click.option(
    "--only", multiple=True, metavar="GLOB", help="Only these modules or components (repeatable)."
)
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Not these modules or components (repeatable)."
)
@click.option(
    "--ema", is_flag=True, help="Read the averaged weights where a checkpoint holds them too."
)
@click.option(
    "--allow-unused",
    is_flag=True,
    help="Go on where layers have no partner; the report lists them.",
)
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
    """Say which adapter suits the difference of two checkpoints: which algorithm, which rank, and what it would lose.

    BASE and TUNED are as for extract, and nothing is written. For a range of file sizes the table gives the error of a LoRA
    with one rank everywhere (extract --rank), of one with the ranks chosen (--size), and of the best choice for each layer
    (--algo auto); then that of a LoKr at each factor, beside a LoRA of the same size.

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
