"""Output of `advise`, as JSON or as tables."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from adaptkit.cli.show.page import facts, page, table
from adaptkit.cli.show.text import document, human

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops.advise import Report
    from adaptkit.ops.difference.advice import Advice, Point

__all__ = ["advised"]


def advised(talk: Talk, report: Report, base: Path, tuned: Path) -> None:
    """Print the tables on stdout, and notes and layers without a counterpart on stderr."""
    if talk.as_json:
        document(talk.command, report.to_dict())
        return
    if talk.quiet:
        return
    out, err = page(), page(stderr=True)
    out.print(facts(_lines(report, base, tuned)))
    out.print()
    names = ["rank", "size", "--rank", "--size", "auto", "auto stores"]
    out.print(table(names, _ranks(report), right=names[:-1]))
    if report.lokr:
        out.print()
        names = ["factor", "size", "lokr", "lora --size"]
        out.print(table(names, _factors(report), right=names))
    if report.recommended is not None:
        out.print()
        out.print(facts(_advice(report.recommended, base, tuned)))
    for note in report.notes:
        err.print(f"note: {note}", style="yellow")
    if report.unused:
        err.print(
            f"{len(report.unused)} layers have no counterpart, the first is {report.unused[0].key}",
            style="yellow",
        )


def _advice(advice: Advice, base: Path, tuned: Path) -> Iterator[tuple[str, str]]:
    """The command to run, and what it will lose."""
    yield "recommended", shlex.join(["adaptkit", "extract", str(base), str(tuned), *advice.options])
    most = "" if advice.exact else "at most "
    error, size = _percent(advice.point.relative_error), human(advice.point.bytes)
    yield "loses", f"{most}{error} of ‖ΔW‖" + (f", in {size}" if advice.exact else "")


def _lines(report: Report, base: Path, tuned: Path) -> Iterator[tuple[str, str]]:
    yield "difference", f"{tuned.name} − {base.name}"
    yield "family", report.family
    yield "layers", f"{report.layers} differ, {report.unchanged} do not; ‖ΔW‖ = {report.norm:.4g}"
    yield "rounding", f"{_percent(report.noise_floor)} of ‖ΔW‖; smaller errors are meaningless"
    if report.left_out:
        yield (
            "left out",
            f"{_percent(report.left_out)} of ‖ΔW‖ is in biases, norms and other layers that no "
            "adapter holds; every error includes it",
        )
    yield "table", "relative errors ‖ΔW − stored‖ / ‖ΔW‖"


def _ranks(report: Report) -> Iterator[tuple[str, ...]]:
    for rank, choice in report.rank.items():
        size, auto = report.size[rank], report.auto[rank]
        yield (
            str(rank),
            human(choice.bytes),
            _percent(choice.relative_error),
            _percent(size.relative_error),
            _percent(auto.relative_error),
            _mix(auto),
        )


def _factors(report: Report) -> Iterator[tuple[str, ...]]:
    for factor, choice in report.lokr.items():
        beside = report.beside[factor]
        yield (
            str(factor),
            human(choice.bytes),
            _percent(choice.relative_error),
            _percent(beside.relative_error),
        )


def _mix(choice: Point) -> str:
    counts: Mapping[str, int] = choice.mix
    return " · ".join(
        f"{counts[name]} {name}" for name in ("lora", "lokr", "full", "nothing") if name in counts
    )


def _percent(share: float) -> str:
    return f"{share:.3g}" if share < 0.001 else f"{share:.1%}"
