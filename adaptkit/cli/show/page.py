"""Printing of reports: rich on a terminal, plain lines in a pipe or a file.

Importing rich takes half as long as converting a small file. A script that converts thousands of
files does not need it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.cli.show.text import document, safe, safe_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

__all__ = ["LABEL", "Facts", "Table", "Words", "console", "facts", "listed", "page", "table"]

LABEL = "bold cyan"
# between columns
_GAP = "  "
# characters of a table cell; longer cells get their own lines
_NARROW = 76
# width in a pipe, so that no line is wrapped
_UNWRAPPED = 10_000
# columns by which the rest of a wrapped line is indented
_HANG = 2
# variables that make rich treat a pipe as a terminal
_COLOURED = ("FORCE_COLOR", "TTY_COMPATIBLE")


class Words(NamedTuple):
    """Text in one style, without markup or emoji, as key names may look like both."""

    text: str
    style: str = ""

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(safe(self.text), style=self.style)


class Facts(NamedTuple):
    """A column of labels and a column of values, which may span lines."""

    rows: Sequence[tuple[str, str]]

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in self.rows:
            grid.add_row(Text(f"  {name}", style=LABEL), Text(value))
        return grid

    def lines(self) -> Iterator[str]:
        """Yield the lines with all labels padded to the widest."""
        return _aligned([(f"  {name}", value) for name, value in self.rows], (False, False))


class Table(NamedTuple):
    """A header and rows without borders, ready to copy; `right` names the number columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str]

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        built = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=LABEL)
        for name in self.columns:
            number = name in self.right
            built.add_column(
                name, justify="right" if number else "left", overflow="fold", no_wrap=number
            )
        for row in self.rows:
            built.add_row(*map(Text, row))
        return built

    def lines(self) -> Iterator[str]:
        """Yield the lines with every column as wide as its widest cell."""
        return _aligned([self.columns, *self.rows], [name in self.right for name in self.columns])


def facts(rows: Iterable[tuple[str, str]]) -> Facts:
    """Make a grid of labels and values."""
    return Facts([(safe(name), safe_lines(value)) for name, value in rows])


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()
) -> Table:
    """Make a table without its empty columns."""
    cells = [["" if cell is None else safe_lines(str(cell)) for cell in row] for row in rows]
    used = [n for n in range(len(columns)) if any(row[n] for row in cells)]
    return Table(
        [columns[n] for n in used], [[row[n] for n in used] for row in cells if used], right
    )


class Plain:
    """The part of a rich console that reports use, for pipes and files."""

    def __init__(self, stderr: bool) -> None:
        self.stderr = stderr

    def print(self, *parts: str | Words | Facts | Table, style: str = "") -> None:
        """Print words on one line and a table on its own lines, without trailing spaces."""
        beside: list[str] = []
        lines: list[str] = []
        for part in parts:
            if isinstance(part, Facts | Table):
                lines += [line.rstrip() for line in part.lines()]
            else:
                beside.append(safe(part if isinstance(part, str) else part.text))
        if beside or not parts:
            lines.insert(0, " ".join(beside))
        if lines:
            (sys.stderr if self.stderr else sys.stdout).write("\n".join(lines) + "\n")


def page(stderr: bool = False) -> Console | Plain:
    """Return the printer of a report; only a terminal gets colours and wrapped lines."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return console(stderr) if terminal or any(map(os.environ.get, _COLOURED)) else Plain(stderr)


def console(stderr: bool = False) -> Console:
    """Make a rich console that takes no markup, emoji or control characters from key names."""
    from rich.console import Console

    class Shown(Console):
        def print(self, *parts: Any, **style: Any) -> None:
            shown = [Words(p) if isinstance(p, str) else p for p in parts]
            if shown and not style.get("no_wrap") and all(isinstance(p, Words) for p in shown):
                shown = [_hanging(shown, self)]
            super().print(*shown, **style)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Shown(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if terminal else _UNWRAPPED,
    )


def _hanging(parts: Sequence[Words], out: Console) -> Text:
    """Words on one line; where it must wrap, the rest is indented under its beginning."""
    from rich.text import Text

    whole = Text(" ").join(part.__rich__() for part in parts)
    lead = len(whole.plain) - len(whole.plain.lstrip(" "))
    hang = lead + _HANG
    if whole.cell_len <= out.width or out.width < 2 * hang:
        return whole
    first, *rest = whole[lead:].wrap(out, out.width - hang)
    return Text("\n").join([Text(" " * lead) + first, *(Text(" " * hang) + one for one in rest)])


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> Iterator[str]:
    """Align rows of cells; a cell may have several lines."""
    split = [[cell.split("\n") for cell in row] for row in rows]
    # a text column at the end needs no padding
    padded = [*([True] * (len(right) - 1)), *right[-1:]]
    columns = (
        (line for row in split for line in row[n]) if pad else () for n, pad in enumerate(padded)
    )
    widths = [max(map(_width, column), default=0) for column in columns]
    for row in split:
        for n in range(max(map(len, row), default=1)):
            cells = [cell[n] if n < len(cell) else "" for cell in row]
            spaces = [
                " " * (width - _width(cell)) if width else ""
                for cell, width in zip(cells, widths, strict=True)
            ]
            both = zip(cells, spaces, right, strict=True)
            yield _GAP.join(
                space + cell if number else cell + space for cell, space, number in both
            )


def _width(text: str) -> int:
    """Return the width of a text on a terminal; CJK letters take two columns."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def listed(kind: str, rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print the table of families, formats or algorithms."""
    if as_json:
        return document(kind, {kind: [dict(row) for row in rows]})
    columns = list(rows[0])
    shown = [[_spelled(row[c]) for c in columns] for row in rows]
    if all(len(cell) <= _NARROW for row in shown for cell in row):
        page().print(table([c.replace("_", " ") for c in columns], shown))
        return
    for name, title, *rest in shown:
        page().print(Words(name, "bold"), Words(title))
        page().print(
            facts(
                (c.replace("_", " "), cell)
                for c, cell in zip(columns[2:], rest, strict=True)
                if cell
            )
        )


def _spelled(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_spelled(title)}" for name, title in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
