"""The page of `inspect --html`: one file that needs nothing else and asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit import __version__
from adaptkit.cli.show.text import counts, human
from adaptkit.cli.show.web.colours import FONTS, STEPS, variables
from adaptkit.cli.show.web.parts import cell, heads, long, section, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptkit.ops.inspect import Report

__all__ = ["document"]

_COLUMNS = ("file", "size", "kind", "family", "format", "modules", "rank", "‖ΔW‖", "problems")
_NUMBERS = ("size", "rank", "‖ΔW‖", "problems")
# ranks of a file that are named
_RANKS = 4


def document(reports: Sequence[Report], names: Mapping[str, str], modules: bool) -> str:
    """The page as HTML. `names` are the names of files by their path.

    A content policy allows the page its own style and script and nothing else, so that no text of
    a file can run or load anything, however it were written.
    """
    style, script = _style(), _read("page.js")
    allowed = f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:"
    size = sum(report.record.get("bytes", 0) for report in reports)
    files = "1 file" if len(reports) == 1 else f"{len(reports)} files"
    whole = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {allowed}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        '<link rel="icon" href="data:,">',
        f"<title>{_title(reports, names)}</title>",
        f"<style>{style}</style>",
        "<header><h1>adaptkit inspect</h1>"
        f'<p class="muted">{files}, {human(size)} · adaptkit {__version__}</p></header>',
        *_table(reports, names),
        *_sections(reports, names, modules),
        f"<script>{script}</script>",
        "</html>",
    ]
    return "\n".join(whole) + "\n"


def _title(reports: Sequence[Report], names: Mapping[str, str]) -> str:
    if len(reports) == 1:
        return f"{text(_name(reports[0], names))} – adaptkit"
    return f"{len(reports)} files – adaptkit"


def _name(report: Report, names: Mapping[str, str]) -> str:
    return names.get(report.record["path"], report.record["path"])


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _style() -> str:
    shades = "".join(
        f".s{n} {{ background: var(--s{n}); color: var(--t{n}); }}\n" for n in range(STEPS)
    )
    fonts = f"body {{ font-family: {FONTS}; }}\n"
    return variables() + fonts + _read("page.css") + shades


def _digest(content: str) -> str:
    found = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(found).decode()}"


def _table(reports: Sequence[Report], names: Mapping[str, str]) -> Iterator[str]:
    yield '<input type="search" placeholder="search files" aria-label="search files">'
    yield '<span id="told" class="muted" role="status"></span>'
    yield '<div class="scroll" tabindex="0"><table id="files" class="sorted">'
    yield f"<thead><tr>{heads(_COLUMNS, _NUMBERS)}</tr></thead><tbody>"
    for n, report in enumerate(reports):
        name = long(_name(report, names), f"f{n}")
        cells = _failed(name) if report.error is not None else _cells(report, name)
        yield f'<tr data-file="f{n}">{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


def _failed(name: str) -> Iterator[str]:
    yield cell(name)
    yield cell("", -1, number=True)
    yield cell('<span class="error">cannot be read</span>')
    yield from (cell(""), cell(""), cell(""))
    yield from (cell("", -1, number=True), cell("", -1, number=True), cell("", 1e9, number=True))


def _cells(report: Report, name: str) -> Iterator[str]:
    record = report.record
    ranks = [*map(int, record["ranks"])]
    shown = " ".join(list(record["ranks"])[:_RANKS]) + (" …" if len(ranks) > _RANKS else "")
    norm, problems = record.get("norm"), len(record["problems"])
    yield cell(name)
    yield cell(human(record["bytes"]), record["bytes"], number=True)
    yield from (cell(text(one)) for one in (record["kind"], record["family"] or "?"))
    yield cell(text(record["format"] or ""))
    yield cell(text(counts(record["algorithms"])))
    yield cell(shown, max(ranks, default=-1), number=True)
    yield cell("" if norm is None else f"{norm:.3g}", -1 if norm is None else norm, number=True)
    yield cell(str(problems) if problems else "", problems, number=True)


def _sections(reports: Sequence[Report], names: Mapping[str, str], modules: bool) -> Iterator[str]:
    only = " open" if len(reports) == 1 else ""
    for n, report in enumerate(reports):
        said = report.record.get("metadata", {})
        words = text(" ".join((*said, *(v for v in said.values() if not v.startswith("data:")))))
        yield f'<details class="file" id="f{n}" data-words="{words}"{only}>'
        yield f"<summary><h2>{text(_name(report, names))}</h2></summary>"
        yield from section(report, modules)
        yield "</details>"
