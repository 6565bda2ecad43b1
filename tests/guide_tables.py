"""The generated tables of the guide, made from what the program prints with --json.

A generated section stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from adaptkit.files.limits import LIMITS
from adaptkit.hosts import hosts
from adaptkit.hosts._measured import measurement
from tests.examples import run

SECTION = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def generated(path: Path) -> dict[str, str]:
    """Every generated section of a page as it stands there."""
    return {name: body for _, name, body, _ in SECTION.findall(path.read_text(encoding="utf-8"))}


def generate(path: Path) -> None:
    """Write the generated sections of a page anew."""
    text = path.read_text(encoding="utf-8")
    fresh = SECTION.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)
    path.write_text(fresh, encoding="utf-8", newline="\n")


@functools.cache
def listed(kind: str) -> list[dict[str, Any]]:
    return json.loads(run(f"adaptkit {kind} --json"))[kind]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def limits() -> str:
    rows = [
        (name, f"{limit.most:,}", limit.unit + (f" ({limit.note})" if limit.note else ""))
        for name, limit in LIMITS.items()
    ]
    return table(("limit", "at most", "of"), rows)


def families() -> str:
    return table(
        ("name", "model", "parts"),
        [(f["name"], f["title"], ", ".join(f["components"])) for f in listed("families")],
    )


def formats() -> str:
    return table(
        ("name", "written by", "alpha", "note"),
        [(f["name"], f["written_by"], f["alpha"], f["note"]) for f in listed("formats")],
    )


def keys() -> str:
    examples = (f"# {f['title']}\n{f['example']}\n" for f in listed("formats"))
    return "\n```text\n" + "".join(examples) + "```\n\n"


def algorithms() -> str:
    return table(
        ("name", "algorithm", "tensors", "extract"),
        [
            (a["name"], a["title"], ", ".join(a["tensors"]), "yes" if a["extract"] else "")
            for a in listed("algorithms")
        ],
    )


def _measured(host: str) -> str:
    found = measurement(host)
    how = "run" if found.how == "run" else "described from its code"
    return f"{found.version}, {how} in {found.date}"


def host_names() -> str:
    return table(
        ("name", "host", "measured with"),
        [(h.name, h.title, _measured(h.name)) for h in hosts().values()],
    )


def loads() -> str:
    """The formats that each host loads completely, family by family."""
    rows = []
    for family in listed("families"):
        cells = [
            " · ".join(
                f["name"]
                for f in listed("formats")
                if family["name"] in f["loads_in"].get(host, ())
            )
            for host in hosts()
        ]
        rows.append((family["name"], *(cell or "–" for cell in cells)))
    return table(("family", *hosts()), rows)


TABLES: dict[str, Callable[[], str]] = {
    "algorithms": algorithms,
    "families": families,
    "formats": formats,
    "host-names": host_names,
    "keys": keys,
    "limits": limits,
    "loads": loads,
}
