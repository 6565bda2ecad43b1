"""Output of `compare`, as JSON or as text."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.page import LABEL, facts, page, table
from adaptkit.cli.show.text import document, trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import compare

__all__ = ["compared"]

# modules shown without -v
_WORST = 5
# names shown of the modules that only one side has
_FEW = 3


def compared(talk: Talk, report: compare.Report) -> None:
    """Print the report on stdout; keys not compared and an exceeded tolerance on stderr."""
    if talk.as_json:
        document(talk.command, report.to_dict())
    elif not talk.quiet:
        out = page()
        out.print(facts((name, value) for name, value in _lines(report) if value))
        _modules(out, report, talk.verbose)
        _print_notes(report)
    if report.exceeded:
        trouble(str(report.exceeded))


def _lines(report: compare.Report) -> Iterator[tuple[str, str]]:
    if report.checkpoint:
        yield "adapter (A)", _file(report.a)
        yield (
            "change (D)",
            f"{PurePath(report.b['path']).name} − {PurePath(report.base or '').name}",
        )
        yield (
            "strength",
            f"{_number(report.strength)}, at which the adapter alone is nearest to D",
        )
        yield "cosine", _number(report.cosine) + _share(report.cosine)
        yield (
            "relative error",
            f"{_number(report.relative_error)} (‖D − A‖ / ‖A‖)" + _common(report),
        )
        yield (
            "norms",
            f"‖A‖ = {_number(report.norm_a)}, ‖D‖ = {_number(report.norm_b)} in A's modules",
        )
    else:
        yield "A", _file(report.a)
        yield "B", _file(report.b)
        same = ": the same" if report.relative_error == 0.0 else " (‖A − B‖ / ‖B‖)"
        yield "relative error", _number(report.relative_error) + same + _common(report)
        yield "cosine", _number(report.cosine)
        yield "norms", f"‖A‖ = {_number(report.norm_a)}, ‖B‖ = {_number(report.norm_b)}"
    if report.differ is None:
        yield "modules", f"{len(report.modules)} in both"
    else:
        yield "layers", f"{len(report.modules)} in both, {report.differ} of them differ"
    yield "only in A", _names(report.only_a)
    yield (
        ("elsewhere", _elsewhere(report))
        if report.checkpoint
        else ("only in B", _names(report.only_b))
    )
    if report.tolerance is not None and not report.exceeded:
        yield "tolerance", f"{report.tolerance:g}: met"


def _file(side: Mapping[str, Any]) -> str:
    if "strength" not in side:
        return f"{PurePath(side['path']).name}: checkpoint"
    strength = "" if side["strength"] == 1.0 else f" × {side['strength']:g}"
    algorithms = ", ".join(side["algorithms"])
    return f"{PurePath(side['path']).name}{strength}: {algorithms}, {side['format']} keys"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(cosine: float | None) -> str:
    """Return the share of ‖D‖² that the adapter explains at this cosine."""
    return (
        ""
        if cosine is None
        else f": the adapter explains {cosine * cosine:.1%} of ‖D‖² in its modules"
    )


def _common(report: compare.Report) -> str:
    alone = report.only_a if report.checkpoint else (*report.only_a, *report.only_b)
    return f"; {_number(report.relative_error_common)} over the common modules" if alone else ""


def _names(labels: Sequence[str]) -> str:
    more = len(labels) - _FEW
    rest = f"\nand {more} more (see --json)" if more > 0 else ""
    return f"{len(labels)}: " + "\n".join(labels[:_FEW]) + rest if labels else ""


def _elsewhere(report: compare.Report) -> str:
    share = f"{report.outside:.1%}" if report.outside else "nothing"
    others = f", in {len(report.only_b)} changed layers that are not in A" if report.only_b else ""
    return f"{share} of ‖D‖²{others}"


def _modules(out: Any, report: compare.Report, every: bool) -> None:
    """Print every module, or the worst."""
    names = [
        "relative_error",
        "cosine",
        "norm_a",
        "norm_b",
        *(["strength"] if report.checkpoint else []),
    ]
    chosen = list(report.modules)
    if not every:
        names = [name for name in names if not name.startswith("norm")]
        chosen = [one for one in chosen if one.relative_error != 0.0]
        chosen = sorted(chosen, key=_badness, reverse=True)[:_WORST]
    if chosen:
        if not every:
            out.print("  worst modules", style=LABEL)
        columns = [*(name.replace("_", " ") for name in names), "module"]
        rows = ([*(_number(getattr(one, name)) for name in names), one.module] for one in chosen)
        out.print(table(columns, rows, right=columns[:-1]))


def _badness(module: compare.ModuleDistance) -> float:
    return float("inf") if module.relative_error is None else module.relative_error


def _print_notes(report: compare.Report) -> None:
    err = page(stderr=True)
    for reason, count in Counter(item.reason for item in report.unused).items():
        first = next(item.key for item in report.unused if item.reason == reason)
        err.print(f"  {count} not compared, the first is {first}: {reason}", style="yellow")
    for note in report.notes:
        err.print(f"note: {note}", style="yellow")
