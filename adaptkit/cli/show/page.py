"""What reports are printed on: rich where a person looks on, plain lines in a pipe or a file.

Importing rich takes as long as half of a conversion of a small file; a script that converts thousands needs none of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.cli.show.text import document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

__all__ = ["LABEL", "Facts", "Table", "Words", "console", "facts", "listed", "page", "table"]

LABEL = "bold cyan"
_GAP = "  "  # between columns
_NARROW = 76  # characters of a table cell; longer ones get lines of their own
_UNWRAPPED = 10_000  # columns: what goes into a pipe is not broken into lines
_COLOURED = (
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
)  # the variables that make rich take a pipe for a terminal


class Words(NamedTuple):
    """A run of text in one style; never markup or emoji, as key names may look like both."""

    text: str
    style: str = ""

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(self.text, style=self.style)


class Facts(NamedTuple):
    """A column of labels and one of values, which may be several lines."""

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
        """The labels padded to the widest."""
        return _aligned([(f"  {name}", value) for name, value in self.rows], (False, False))


class Table(NamedTuple):
    """Header and rows without borders, so that they can be cut and pasted; `right` are the columns of numbers."""

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
        """Every column as wide as its widest cell."""
        return _aligned([self.columns, *self.rows], [name in self.right for name in self.columns])


def facts(rows: Iterable[tuple[str, str]]) -> Facts:
    """A two-column grid of label and value."""
    return Facts(list(rows))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()
) -> Table:
    """A plain table; columns without content are left out."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    used = [n for n in range(len(columns)) if any(row[n] for row in cells)]
    return Table(
        [columns[n] for n in used], [[row[n] for n in used] for row in cells if used], right
    )


class Plain:
    """As much of a rich console as the reports use, for streams that no person looks at."""

    def __init__(self, stderr: bool) -> None:
        self.stderr = stderr

    def print(self, *parts: str | Words | Facts | Table, style: str = "") -> None:
        """Words beside one another in one line, a table in lines of its own; no trailing spaces."""
        beside: list[str] = []
        lines: list[str] = []
        for part in parts:
            if isinstance(part, Facts | Table):
                lines += [line.rstrip() for line in part.lines()]
            else:
                beside.append(part if isinstance(part, str) else part.text)
        if beside or not parts:
            lines.insert(0, " ".join(beside))
        if lines:
            (sys.stderr if self.stderr else sys.stdout).write("\n".join(lines) + "\n")


def page(stderr: bool = False) -> Console | Plain:
    """What to print a report on: stdout or stderr, with colours and wrapped lines on a terminal only."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return console(stderr) if terminal or any(map(os.environ.get, _COLOURED)) else Plain(stderr)


def console(stderr: bool = False) -> Console:
    """A rich console; colour and wrapping only on a terminal, no markup or emoji read out of key names."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if terminal else _UNWRAPPED,
    )


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> Iterator[str]:
    """Rows of cells, the lines of a cell below one another."""
    split = [[cell.split("\n") for cell in row] for row in rows]
    padded = [*([True] * (len(right) - 1)), *right[-1:]]  # nothing stands after the last column
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
    """The columns that a terminal gives a text: CJK letters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def listed(kind: str, rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Show one of the tables of what this version knows."""
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
