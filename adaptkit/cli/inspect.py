"""adaptkit inspect."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import ALPHA_IN, INPUT, PATH, inputs, picture, talk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from adaptkit.ops.inspect import Report


def _can_plot(path: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Refuse an impossible picture before any file is read."""
    from adaptkit.cli.show.picture import check

    if len(files) != 1:
        raise click.UsageError(f"--plot draws one file, not {len(files)}")
    check(path, overwrite)


SORTS = ("name", "family", "rank", "size", "date")


@click.command()
@click.argument("files", nargs=-1, required=True, type=INPUT, metavar="FILE...")
@click.option("--keys", is_flag=True, help="List all tensors: key, dtype, shape.")
@click.option(
    "--modules", is_flag=True, help="List all adapted modules: algorithm, rank, alpha, shape."
)
@click.option(
    "--stats",
    is_flag=True,
    help="Also read the weights: norms and ranks by block; zeros, NaN, overflow.",
)
@click.option(
    "--safety",
    is_flag=True,
    help="Also say whether loading it elsewhere could run code, limits, NaN, odd metadata.",
)
@click.option(
    "--sort",
    type=click.Choice(SORTS, case_sensitive=False),
    help="Order of several files.",
)
@click.option(
    "--where",
    multiple=True,
    metavar="FIELD=GLOB",
    help="Only files of which this holds, such as family=sdxl or problems=error (repeatable).",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the table of files as CSV.")
@picture("the statistics")
@click.option(
    "--card", type=PATH, metavar="FILE.md", help="Write a model card of one adapter in Markdown."
)
@click.option(
    "--html",
    type=PATH,
    metavar="FILE.html",
    help="Write all of it as one page to look at, search and sort in a browser.",
)
@click.option("--hash", is_flag=True, help="Add the SHA-256, AutoV2 and AutoV3 of each file.")
@inputs
@ALPHA_IN
@talk
def inspect(
    files: tuple[Path, ...],
    keys: bool,
    modules: bool,
    stats: bool,
    safety: bool,
    sort: str | None,
    where: tuple[str, ...],
    as_csv: bool,
    plot: Path | None,
    card: Path | None,
    html: Path | None,
    overwrite: bool,
    hash: bool,
    family: str | None,
    format: str | None,
    alpha_in: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Identify adapter files and checkpoints from their headers.

    FILE is a .safetensors file, a pickle (.ckpt, .pt, .bin), an index of shards or a folder. A
    diffusers or PEFT folder counts as one file; any other folder is searched for weight files.
    Without --stats, --plot and --html no weights are read and torch is not loaded. Several files
    are shown as a table: --sort orders it, and --where selects by family, format, kind, algorithm,
    part, rank, dtype or problems.

    --stats computes ‖ΔW‖ and the singular values of every module. It prints, for every block, a
    heat map of ‖ΔW‖ per kind of layer and the ranks that hold 90 and 99 % of it. --plot also
    draws the spectra. --html measures the same of all files and writes one page: a table to sort
    and search, and for each file its metadata, map and spectra, and with --modules its modules.

    --safety reads the file as bytes and says whether loading it in another program could run code,
    and which globals a pickle names; which limits are near; NaN and infinity; odd metadata.

    Exits with 1 if a file cannot be read or has an error (a missing half, NaN under --stats), after
    reporting the others.
    """
    from adaptkit.cli.show.inspect import inspected
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import inspect as op
    from adaptkit.ops.stages import logged

    found = dict(op.found_in(files))
    paths = list(found)
    op.where((), where)  # a wrong condition is told before a thousand files are read
    stats = stats or plot is not None or html is not None
    if plot is not None:
        _can_plot(plot, paths, overwrite)
    if card is not None:
        _can_write(card, paths, overwrite)
    if html is not None:
        _can_write_page(html, overwrite)
    hash = hash or card is not None
    options = op.Options(
        family=family, format=format, alpha_in=alpha_in, hash=hash, stats=stats, safety=safety
    )
    modules = modules or verbose
    listed_too = modules or (stats and as_json)
    table = as_csv or (len(paths) > 1 and not (as_json or keys or modules or stats or safety))
    with (
        Talk("inspect", as_json, quiet, verbose).progress(
            "reading weights" if stats else "reading"
        ) as progress,
        logged("inspect", progress) as bar,
    ):
        if as_json and len(paths) > 1 and not (stats or sort):
            from adaptkit.cli.show.inspect import streamed

            one_by_one = op.stream(paths, options, bar)
            broken = streamed(one_by_one, lambda one: bool(op.where([one], where)), keys, modules)
            return int(broken)
        if len(paths) == 1 or stats:
            reports = [op.run(path, options, bar) for path in paths]
        else:
            reports = op.survey(paths, op.shortened(options) if table else options, bar)
    reports = op.ordered(op.where(reports, where), sort)
    twice = Counter(found.values())
    text = None if card is None or reports[0].error else op.card(reports[0])
    names = {str(p): name if twice[name] == 1 else str(p) for p, name in found.items()}
    if as_csv:
        from adaptkit.cli.show.inspect import listed

        listed(reports, names)
    silent = quiet or as_csv or html is not None
    inspected(reports, names, keys=keys, modules=listed_too, as_json=as_json, quiet=silent)
    if card is not None and text is not None:
        _carded(text, card, quiet)
    if html is not None:
        _page(reports, names, html, modules=modules, overwrite=overwrite, quiet=quiet)
    if plot is not None and reports[0].error is None:
        _plotted(reports[0], plot, overwrite, quiet)
    return 1 if any(report.broken for report in reports) else 0


def _can_write(path: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Refuse an impossible card before any file is read."""
    from adaptkit.ops.shared import check_output

    if len(files) != 1:
        raise click.UsageError(f"--card describes one file, not {len(files)}")
    check_output(path, overwrite)


def _can_write_page(path: Path, overwrite: bool) -> None:
    """Refuse an impossible page before any file is read."""
    from adaptkit.cli.show.picture import may_write

    if path.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"--html writes a .html file, not {path.name!r}")
    may_write(path, overwrite)


def _page(
    reports: Sequence[Report],
    names: Mapping[str, str],
    path: Path,
    *,
    modules: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    from adaptkit.cli.show.picture import publish
    from adaptkit.cli.show.web.document import document

    publish(path, document(reports, names, modules).encode(), overwrite)
    if not quiet:
        click.echo(f"wrote {path}", err=True)


def _carded(text: str, path: Path, quiet: bool) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
    if not quiet:
        click.echo(f"wrote {path}", err=True)


def _plotted(report: Report, path: Path, overwrite: bool, quiet: bool) -> None:
    from adaptkit.cli.show.plot_inspect import draw

    draw(report, path, overwrite)
    if not quiet:
        click.echo(f"wrote {path}", err=True)
