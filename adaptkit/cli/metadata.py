"""adaptkit metadata."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import INPUT, PATH, talk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from adaptkit.ops.metadata import Report

# longer values are shown by their size, longer lists by their first items
_LONG, _TAGS = 300, 30


class _Entry(click.ParamType):  # type: ignore[type-arg]
    """`modelspec.title=My style`: a name and a value."""

    name = "entry"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name:
            self.fail(f"expected KEY=VALUE, got {value!r}", param, ctx)
        return name, text


@click.command()
@click.argument("file", type=INPUT)
@click.option(
    "--set",
    "entries",
    multiple=True,
    type=_Entry(),
    metavar="KEY=VALUE",
    help="Set an entry (repeatable).",
)
@click.option("--unset", multiple=True, metavar="KEY", help="Remove an entry (repeatable).")
@click.option(
    "--strip",
    type=click.Choice(["training", "all"]),
    help="Remove kohya's entries about the training, or all that readers do not need.",
)
@click.option(
    "--copy-from",
    type=INPUT,
    metavar="FILE",
    help="Add the entries of another file, but no hashes.",
)
@click.option("-o", "--output", type=PATH, help="File to write.  [default: FILE itself]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@talk
def metadata(
    file: Path,
    entries: tuple[tuple[str, str], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **chosen: Any,
) -> None:
    """Show or change the metadata of a safetensors file.

    Without options all entries are shown: what the model is, how it was trained, the tags of the
    training images by frequency, and the hashes AutoV2 and AutoV3. Long values are shown with -v.

    A change writes a new file and puts it in the place of FILE when it is complete. The bytes of
    the tensors stay the same. A change that would alter the weights, since alpha stands in the
    metadata, is refused.

    \b
    adaptkit metadata style.safetensors
    adaptkit metadata style.safetensors --set "modelspec.title=My style" --unset ss_dataset_dirs
    adaptkit metadata style.safetensors --strip training -o clean.safetensors
    adaptkit metadata small.safetensors --copy-from style.safetensors
    """
    from adaptkit.cli.show.page import facts, page
    from adaptkit.cli.show.text import document, named
    from adaptkit.ops import metadata as op

    options = op.Options(set=dict(entries), **chosen)
    if options.output is not None and not options.changes:
        raise click.UsageError("nothing to change: give --set, --unset, --strip or --copy-from")
    report = op.edit(file, options) if options.changes else op.read(file)
    if as_json:
        return document("metadata", report.to_dict())
    if options.changes:
        click.echo(named(report.path))
    if not quiet:
        out = page(stderr=options.changes)
        out.print(PurePath(report.path).name, style="bold")
        out.print(facts(_lines(report, whole=verbose)))
    return None


def _lines(report: Report, *, whole: bool) -> Iterator[tuple[str, str]]:
    from adaptkit.cli.show.text import safe

    hidden = {"ss_tag_frequency"} if report.tags else set()
    hidden |= {"modelspec.thumbnail"} if report.thumbnail else set()
    for name, value in report.metadata.items():
        if name not in hidden:
            long = len(value) > _LONG and not whole
            shown = safe(value[:_LONG] if long else value)
            yield safe(name), f"{shown} … ({len(value):,} characters; -v)" if long else shown
    if report.thumbnail:
        kind, size = report.thumbnail
        yield "thumbnail", f"{safe(kind)}, {size:,} bytes"
    if report.tags:
        tags = report.tags if whole else report.tags[:_TAGS]
        more = len(report.tags) - len(tags)
        shown = ", ".join(f"{safe(tag)} {count}" for tag, count in tags)
        yield "tags", shown + (f" and {more} more (-v)" if more else "")
    yield "AutoV2", report.hashes["autov2"]
    yield "AutoV3", report.hashes["autov3"]
    yield "sha256", report.hashes["sha256"]
    for name in report.stale:
        yield "warning", f"{name} is not the hash of these tensors"
