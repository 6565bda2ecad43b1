"""What `resize` wrote, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.cli.show.text import counts, human, lossy, ranks

if TYPE_CHECKING:
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import resize

__all__ = ["resized"]


def resized(talk: Talk, report: resize.Report) -> None:
    """Summary of a resize."""
    rows = [
        ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
        ("modules", f"{report.modules}: {counts(report.changes, '{1} {0}')}"),
        (
            "ranks",
            ranks(report.details),
        ),
        ("weights", lossy(report.relative_error)),
    ]
    talk.written(
        report,
        rows,
        ("algorithm", "rank_before", "rank", "relative_error", "module"),
        report.notes,
    )
