"""Text for numbers: sizes, counts, shares and table cells."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from adaptkit import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "MANY",
    "cell",
    "counts",
    "document",
    "human",
    "last",
    "loading",
    "loads_in",
    "lossy",
    "percent",
    "ranks",
    "some",
]

# items listed before "and n more"
MANY = 12
# names in a row
FEW = 5


def document(command: str, body: Mapping[str, Any]) -> None:
    """Print exactly one JSON document on stdout."""
    click.echo(
        json.dumps(
            {"adaptkit": __version__, "command": command, **body}, ensure_ascii=False, indent=2
        )
    )


def human(count: float) -> str:
    """Format bytes in powers of 1000: 151.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def counts(counts: Mapping[str, int], form: str = "{0} {1}") -> str:
    """Format names with their counts: `lora 12 · lokr 4`."""
    shown = [form.format(name, n) for name, n in list(counts.items())[:MANY]]
    more = len(counts) - MANY
    return " · ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    if len(names) <= FEW:
        return ", ".join(names)
    return f"{', '.join(names[: FEW - 2])} and {len(names) - FEW + 2} more"


def percent(share: float) -> str:
    """Format a share with enough digits to distinguish it from 0 and 1."""
    if share in (0.0, 1.0) or 0.001 <= share <= 0.999:
        return f"{share:.1%}"
    return f"{share:.2e}" if share < 0.001 else f"{share:.4%}"


def last(columns: list[str], name: str) -> list[str]:
    """Move the long column to the end, so that a narrow terminal folds only this one."""
    return [*(c for c in columns if c != name), name]


def cell(value: object) -> object:
    """Format a value for a table cell."""
    if isinstance(value, list):
        return "×".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else value


def ranks(details: Iterable[Mapping[str, Any]]) -> str:
    """Count the modules of each rank."""
    found = Counter(detail["rank"] for detail in details if detail["rank"])
    return counts({str(rank): found[rank] for rank in sorted(found)}, "{0} (×{1})")


def lossy(error: float | None, unread: int = 0) -> str:
    """Format the relative error of a whole file, of which so many keys were not read."""
    if error is None and unread:
        return f"error unknown: {unread:,} keys were not read"
    if error is None:
        return "error unknown without --base"
    return "exact" if error == 0 else f"relative error {error:.3g}"


def loading(record: Mapping[str, Any]) -> str:
    """The hosts that load a file in one line, then one for each that does not, with the reason."""
    found, why = record.get("loads_in") or {}, record.get("why", {})
    loads = ", ".join(host for host, loads in found.items() if loads)
    words = {False: "not", None: "?"}
    others = [
        f"{words[loads]} {host}{f' – {why[host]}' if host in why else ''}"
        for host, loads in found.items()
        if not loads
    ]
    return "\n".join([loads or "no host that was measured", *others])


def loads_in(record: Mapping[str, Any]) -> str:
    """One line per host: yes, no or ? with the reason; then what was measured, if it is said."""
    words = {True: "yes", False: "no", None: "?"}
    why = record.get("why", {})
    lines = [
        f"{host}: {words[loads]}{f' – {why[host]}' if host in why else ''}"
        for host, loads in (record.get("loads_in") or {}).items()
    ]
    if with_ := record.get("measured_with"):
        measured = ", ".join(f"{host} {version}" for host, version in with_.items())
        lines.append(f"(measured with {measured})")
    return "\n".join(lines)
