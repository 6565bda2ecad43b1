"""Text for numbers (sizes, counts, shares, table cells), and texts of files made safe to show."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from adaptkit import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "MANY",
    "cell",
    "clean",
    "counts",
    "document",
    "human",
    "json_safe",
    "last",
    "listing",
    "loading",
    "loads_in",
    "lossy",
    "named",
    "percent",
    "ranks",
    "safe",
    "safe_lines",
    "some",
    "trouble",
]

# items listed before "and n more"
MANY = 12
# names in a row
FEW = 5
# columns of a value beside its name
NARROW = 66
# verdicts on hosts, the better first
ORDER = (True, False, None)


def document(command: str, body: Mapping[str, Any]) -> None:
    """Print exactly one JSON document on stdout."""
    whole = {"adaptkit": __version__, "command": command, **body}
    click.echo(json_safe(json.dumps(whole, ensure_ascii=False, indent=2)))


def listing(command: str, name: str, items: Iterable[Mapping[str, Any]]) -> None:
    """Print the `document` of a list while its items are made."""
    head, tail = json.dumps(
        {"adaptkit": __version__, "command": command, name: []}, ensure_ascii=False, indent=2
    ).rsplit("[]", 1)
    click.echo(f"{head}[", nl=False)
    many = False
    for item in items:
        text = json.dumps(item, ensure_ascii=False, indent=2).replace("\n", "\n    ")
        click.echo(json_safe(f"{',' if many else ''}\n    {text}"), nl=False)
        many = True
    click.echo(("\n  ]" if many else "]") + tail)


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
    """The hosts that load a file in one line, then those that do not, by their reasons."""
    words = {False: "not", None: "?"}
    lines: dict[bool | None, list[str]] = {loads: [] for loads in ORDER}
    for hosts, loads, why in _verdicts(record):
        lines[loads].append(f"{words[loads]} {hosts}{why}" if loads is not True else hosts)
    return "\n".join([*(lines[True] or ["no host that was measured"]), *lines[False], *lines[None]])


def loads_in(record: Mapping[str, Any]) -> str:
    """One line per verdict: yes, no or ? with the reason; then what was measured, if it is said."""
    words = {True: "yes", False: "no", None: "?"}
    lines = [f"{hosts}: {words[loads]}{why}" for hosts, loads, why in _verdicts(record)]
    if with_ := record.get("measured_with"):
        # a host and its version stay in one line
        measured = ", ".join(
            f"{host} {version}".replace(" ", "_") for host, version in with_.items()
        )
        wrapped = textwrap.wrap(f"(measured with {measured})", NARROW)
        lines.extend(line.replace("_", " ") for line in wrapped)
    return "\n".join(lines)


def _verdicts(record: Mapping[str, Any]) -> Iterator[tuple[str, bool | None, str]]:
    """The hosts of each verdict and reason, in the order of their first; yes before no before ?."""
    found, why = record.get("loads_in") or {}, record.get("why", {})
    alike: dict[tuple[bool | None, str], list[str]] = {}
    for host, loads in found.items():
        alike.setdefault((loads, why.get(host, "")), []).append(host)
    for (loads, reason), hosts in sorted(alike.items(), key=lambda item: ORDER.index(item[0][0])):
        yield ", ".join(hosts), loads, f" – {reason}" if reason else ""


# texts of files: names, metadata and messages may hold control characters ----------------

# control, bidi and invisible characters that JSON may hold as they are
_HIDDEN = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def safe(text: str) -> str:
    """Escape what a terminal may obey or hide: control, bidi and zero-width characters.

    Every text of a file passes here before it is shown. The result has one line.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(ord(one)) for one in text)


def _escaped(code: int) -> str:
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def safe_lines(text: str) -> str:
    """Escape a text whose line breaks are adaptkit's own."""
    return text if text.isprintable() else "\n".join(map(safe, text.split("\n")))


def clean(value: Any) -> Any:
    """Escape every text in a record."""
    if isinstance(value, str):
        return safe(value)
    if isinstance(value, Mapping):
        return {clean(name): clean(item) for name, item in value.items()}
    return type(value)(map(clean, value)) if type(value) in (list, tuple) else value


def json_safe(text: str) -> str:
    """Escape the characters in a JSON document that a terminal may obey or hide."""
    return _HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def named(path: object) -> str:
    """A path as printed on stdout: as it is for a script, escaped for a terminal."""
    return safe(str(path)) if sys.stdout.isatty() else str(path)


def trouble(message: str, hint: str | None = None) -> None:
    """Print an error and its hint on stderr, each on one line."""
    click.echo(click.style("error:", fg="red", bold=True) + f" {safe(message)}", err=True)
    if hint:
        click.echo(click.style("hint:", fg="cyan", bold=True) + f" {safe(hint)}", err=True)
