"""What `convert` wrote, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.cli.show.text import counts, human, lossy

if TYPE_CHECKING:
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import convert

__all__ = ["converted"]


def converted(talk: Talk, report: convert.Report) -> None:
    """Summary of a conversion."""
    rows = [
        (
            "adapter",
            f"{report.family}, {report.source_format} → {report.format} keys, {human(report.bytes)}",
        ),
        ("modules", f"{report.modules}: {counts(report.changes, '{1} {0}')}"),
        ("weights", lossy(report.relative_error)),
    ]
    talk.written(
        report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
    )
