"""Tables of what this version knows: formats, families, algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptkit.cli.show.page import Words, facts, page, table
from adaptkit.cli.show.text import document

__all__ = ["listed"]

_NARROW = 76  # characters in one cell of a table; longer ones get lines of their own


def listed(kind: str, rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Show one of the tables of what this version knows."""
    if as_json:
        return document(kind, {kind: [dict(row) for row in rows]})
    columns = list(rows[0])
    shown = [[_plain(row[c]) for c in columns] for row in rows]
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


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_plain(title)}" for name, title in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
