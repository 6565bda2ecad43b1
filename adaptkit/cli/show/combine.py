"""What `combine` wrote, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from adaptkit.cli.show.text import counts, human, lossy, ranks

if TYPE_CHECKING:
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import combine

__all__ = ["combined"]


def combined(talk: Talk, report: combine.Report, inputs: Sequence[tuple[str, float]]) -> None:
    """Summary of a combination."""
    kinds = Counter(d["algorithm"] for d in report.details)
    rows = [
        ("inputs", "\n".join(f"{PurePath(path).name} × {weight:g}" for path, weight in inputs)),
        ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
        ("modules", f"{report.modules}: {counts(kinds)}"),
        (
            "ranks",
            ranks(report.details),
        ),
        ("weights", lossy(report.relative_error)),
    ]
    talk.written(
        report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
    )
