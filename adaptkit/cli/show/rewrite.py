"""Summaries of `convert`, `resize` and `combine`."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

from adaptkit.cli.show.text import counts, human, lossy, ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops.rewrite.report import Report

__all__ = ["combined", "converted", "resized"]


def converted(talk: Talk, report: Report) -> None:
    """Print the summary of a conversion."""
    same = report.source_format == report.format
    keys = report.format if same else f"{report.source_format} → {report.format}"
    rows = [
        ("adapter", f"{report.family}, {keys} keys, {human(report.bytes)}"),
        ("modules", f"{report.modules}: {counts(report.changes, '{1} {0}')}"),
        ("weights", lossy(report.relative_error, report.unread)),
    ]
    talk.written(
        report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
    )


def resized(talk: Talk, report: Report) -> None:
    """Print the summary of a resize."""
    rows = [
        ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
        ("modules", f"{report.modules}: {counts(report.changes, '{1} {0}')}"),
        ("ranks", ranks(report.details)),
        ("weights", lossy(report.relative_error, report.unread)),
    ]
    talk.written(
        report, rows, ("algorithm", "rank_before", "rank", "relative_error", "module"), report.notes
    )


def combined(talk: Talk, report: Report, inputs: Sequence[tuple[str, float]]) -> None:
    """Print the summary of a combination."""
    kinds = Counter(d["algorithm"] for d in report.details)
    rows = [
        ("inputs", "\n".join(f"{PurePath(path).name} × {weight:g}" for path, weight in inputs)),
        ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
        ("modules", f"{report.modules}: {counts(kinds)}"),
        ("ranks", ranks(report.details)),
        ("weights", lossy(report.relative_error, report.unread)),
    ]
    talk.written(
        report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
    )
