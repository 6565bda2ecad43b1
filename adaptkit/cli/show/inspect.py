"""Output of `inspect`, as JSON or as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.page import Words, console, facts, page, table
from adaptkit.cli.show.talk import fault
from adaptkit.cli.show.text import (
    MANY,
    cell,
    clean,
    counts,
    document,
    human,
    last,
    listing,
    loads_in,
    percent,
    safe,
    some,
)
from adaptkit.detect import Nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from adaptkit.ops import inspect

__all__ = [
    "MEASURED",
    "OUTLYING",
    "alike",
    "facts_of",
    "inspected",
    "listed",
    "outlying",
    "streamed",
]

OUTLYING = ("kind", "figure", "value", "median", "score", "module")

MEASURED = {
    "algorithm": "algorithm",
    "rank": "rank",
    "norm": "‖ΔW‖",
    "spectral_norm": "σ₁",
    "stable_rank": "stable",
    "rank_90": "r90",
    "rank_99": "r99",
    "module": "module",
}


def inspected(
    reports: Sequence[inspect.Report],
    names: Mapping[str, str],
    *,
    keys: bool,
    modules: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print one file in full or several as a table; errors on stderr.

    `names` are the names of files in the table by their path.
    """
    if as_json:
        document("inspect", {"files": [_with_lists(report, keys, modules) for report in reports]})
    elif not quiet:
        shown = [_cleaned(report, keys, modules) for report in reports]
        _show(shown, clean(names), keys, modules)
    for report in reports:
        if report.error is not None:
            fault(report.error)


def streamed(
    reports: Iterable[inspect.Report],
    meant: Callable[[inspect.Report], bool],
    keys: bool,
    modules: bool,
) -> bool:
    """Print files as JSON while they are read, errors after them; whether one is broken."""
    errors, broken = [], False

    def records() -> Iterator[dict[str, Any]]:
        nonlocal broken
        for report in filter(meant, reports):
            broken = broken or report.broken
            if report.error is not None:
                errors.append(report.error)
            yield _with_lists(report, keys, modules)

    listing("inspect", "files", records())
    for error in errors:
        fault(error)
    return broken


def _cleaned(report: inspect.Report, keys: bool, modules: bool) -> inspect.Report:
    """The report with every text of the file escaped, for a terminal; no list that is not shown."""
    mapped = modules or bool(report.record.get("blocks"))  # the heat map is drawn of modules
    return replace(
        report,
        record=clean(report.record),
        keys=clean(report.keys) if keys else (),
        modules=clean(report.modules) if mapped else (),
    )


def _with_lists(report: inspect.Report, keys: bool, modules: bool) -> dict[str, Any]:
    record = report.to_dict()
    if report.error is None and keys:
        record["keys"] = list(report.keys)
    if report.error is None and modules:
        record["module_list"] = list(report.modules)
    return record


def _show(
    reports: Sequence[inspect.Report], names: Mapping[str, str], keys: bool, modules: bool
) -> None:
    good = [report for report in reports if report.error is None]
    for report in reports:
        if report.error is not None and "safety" in report.record:
            page().print(Words(PurePath(report.record["path"]).name, "bold"))
            _safety(report.record["safety"])
    if len(names) > 1 and not (
        keys
        or modules
        or any(name in report.record for report in good for name in ("blocks", "safety"))
    ):
        return _overview(good, names)
    for report in good:
        _file(report)
        if "safety" in report.record:
            _safety(report.record["safety"])
        if report.record.get("blocks"):
            _blocks(report)
        if report.record.get("outliers"):
            _outliers(report.record["outliers"])
        if modules:
            _modules(report)
        if keys:
            _keys(report)


def _overview(reports: Sequence[inspect.Report], names: Mapping[str, str]) -> None:
    if not reports:
        return
    rows = [
        (
            human(r["bytes"]),
            r["family"] or "?",
            # an adapter's format says that it is one; a narrow terminal has no room to say it twice
            r["format"] or r["kind"],
            counts(r["algorithms"]),
            " ".join(list(r["ranks"])[:4]) + (" …" if len(r["ranks"]) > 4 else ""),
            f"{len(r['problems'])}" if r["problems"] else "",
            names.get(r["path"], r["path"]),
        )
        for r in (report.record for report in reports)
    ]
    columns = ("size", "family", "format", "modules", "rank", "problems", "file")
    page().print(table(columns, rows, right=("size",)))


def listed(reports: Sequence[inspect.Report], names: Mapping[str, str]) -> None:
    """Print the table of files as CSV, with an `error` for those that cannot be read."""
    import csv
    import sys

    columns = ("path", "bytes", "kind", "family", "format", "algorithms", "ranks", "problems")
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow((*columns, "error"))
    for report in reports:
        r = report.record
        name = safe(names.get(r["path"], r["path"]))
        if report.error is not None:
            empty = [""] * (len(columns) - 1)
            out.writerow((name, *empty, safe(report.error.message)))
            continue
        kinds = " ".join(f"{kind}:{count}" for kind, count in r["algorithms"].items())
        cells = (r["kind"], r["family"], r["format"], kinds, " ".join(r["ranks"]))
        out.writerow((safe(name), r["bytes"], *cells, len(r["problems"]), ""))


def _file(report: inspect.Report) -> None:
    record = report.record
    out = page()
    out.print(
        Words(PurePath(record["path"]).name, "bold"),
        Words(f"{record['kind']}, {human(record['bytes'])}"),
    )
    out.print(facts((name, value) for name, value in facts_of(record) if value))
    groups = list(alike(record["problems"]))
    for severity, what in groups[:MANY]:
        style = "red" if severity == "error" else "yellow"
        out.print(Words(f"  {severity}:", style), Words(what))
    if len(groups) > MANY:
        out.print(f"  and {len(groups) - MANY} more problems (see --json)", style="yellow")


def alike(problems: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The severity and the text of every kind of problem, with the first modules that have it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        where = groups.setdefault((problem["severity"], problem["what"]), [])
        where += [problem["module"]] if problem["module"] else []
    for (severity, what), modules in groups.items():
        if len(modules) < 2:
            yield severity, f"{modules[0]}: {what}" if modules else what
        else:
            yield severity, f"{len(modules)} modules: {what}: {some(modules)}"


def facts_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names and values of what is said of a file; a value may be empty or have lines."""
    evidence = record["evidence"]
    beside = ""
    if evidence["alternatives"]:
        beside = f"  (the key names also fit {', '.join(evidence['alternatives'])})"
    elif evidence["nearest"]:
        beside = f"  ({Nearest(**evidence['nearest'])})"
    yield "family", (record["family"] or "unknown") + beside
    yield "format", record["format"] or ""
    yield "layout", record.get("layout", "")
    yield "algorithms", counts(record["algorithms"])
    yield "parts", counts(record["components"])
    yield "ranks", counts(record["ranks"], "{0} (×{1})")
    if record["scales"]:
        origin = {
            "none": "no alpha stored",
            "tensor": "alpha from tensors",
            "metadata": "alpha from metadata",
            "given": "alpha as given",
        }
        stated = origin.get(record["alpha_source"], "alpha from tensors and metadata")
        yield (
            "scales",
            f"{counts(record['scales'], '{0} (×{1})')}"
            + (f", {stated}" if record["ranks"] else ""),
        )
    yield "parameters", f"{record['parameters']:,}"
    yield "dtypes", counts(record["dtypes"], "{0} (×{1})")
    yield "keys", f"{evidence['claimed']} of {evidence['total']} claimed"
    yield "loads in", loads_in(record)
    for name in ("sha256", "autov2", "autov3"):
        yield name, record.get(name, "")
    yield "metadata", _metadata(record["metadata"])


def _metadata(metadata: Mapping[str, str]) -> str:
    shown = (
        "modelspec.title",
        "modelspec.architecture",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
    )
    found = [f"{name} = {metadata[name]}" for name in shown if name in metadata]
    # format=pt is in every file
    rest = len(metadata) - len(found) - ("format" in metadata)
    return "\n".join(
        [*found, *([f"{'and ' if found else ''}{rest} more (see --json)"] if rest else [])]
    )


def _blocks(report: inspect.Report) -> None:
    """Print the norms and ranks of all blocks as a heat map."""
    from adaptkit.cli.show.heat_map import heat_map

    out = console()
    coloured = out.color_system in ("256", "truecolor") and not out.no_color
    out.print()
    for line in heat_map(report.record, report.modules, out.width, coloured):
        if not coloured:
            line.rstrip()
        out.print(line, no_wrap=True, crop=False, overflow="ignore")


def _modules(report: inspect.Report) -> None:
    if not report.modules:
        return
    if "norm" in report.modules[0]:
        return _measured(report.modules)
    columns = last(list(report.modules[0]), "module")
    page().print(table(columns, ([cell(m[c]) for c in columns] for m in report.modules)))


def _measured(modules: Sequence[Mapping[str, Any]]) -> None:
    rows = [[f"{m[c]:.3g}" if isinstance(m[c], float) else m[c] for c in MEASURED] for m in modules]
    columns = list(MEASURED.values())
    out = page()
    out.print()
    out.print(table(columns, rows, right=columns[1:-1]))


def _keys(report: inspect.Report) -> None:
    rows = (
        (k["dtype"], "×".join(map(str, k["shape"])) or "scalar", k["key"], k["note"])
        for k in report.keys
    )
    page().print(table(("dtype", "shape", "key", "note"), rows))


def _safety(found: Mapping[str, Any]) -> None:
    out = page()
    out.print()
    out.print(Words("safety", "bold"))
    out.print(facts((name, value) for name, value in _safety_lines(found) if value))


def _safety_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "format", found["format"]
    yield "loading", _loading(found)
    bad = found["non_finite"]
    if bad is not None:
        plural = "s" if len(bad) > 1 else ""
        told = f"NaN or infinity in {len(bad)} tensor{plural}: {some(bad)}" if bad else "all finite"
        unread = ", ".join(found["not_checked"])
        yield "numbers", told + (f" (not checked: {unread})" if unread else "")
    yield (
        "limits",
        "\n".join(
            f"{one['limit']}: {one['found']:,} of {one['most']:,} {one['unit']}"
            for one in found["limits"]
        )
        or "none is near",
    )
    odd = [f"{one['name']}: {one['what']}" for one in found["metadata"]]
    more = [f"and {len(odd) - MANY} more (see --json)"] if len(odd) > MANY else []
    yield "metadata", "\n".join([*odd[:MANY], *more]) or ("nothing odd" if bad is not None else "")


def _loading(found: Mapping[str, Any]) -> str:
    if found["runs_code"]:
        named = [*found["globals"], *found["code"]]
        return f"could run code in other programs: {some(named)}"
    return "not known" if found["runs_code"] is None else "cannot run code"


def outlying(one: Mapping[str, Any]) -> tuple[str, ...]:
    """A module that stands out as the cells of the columns `OUTLYING`."""
    figures = (_figure(one, "value"), _figure(one, "median"), f"{one['score']:+.1f}")
    return one["kind"], one["figure"], *figures, one["module"]


def _outliers(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the modules that stand out of their kind, one line a figure."""
    out = page()
    out.print()
    out.print(Words("stand out of their kind", "bold"), Words("(which says not why)"))
    out.print(table(OUTLYING, map(outlying, found[:MANY]), OUTLYING[2:5]))
    if len(found) > MANY:
        out.print(f"  and {len(found) - MANY} more (see --json)", style="yellow")


def _figure(one: Mapping[str, Any], name: str) -> str:
    value = one[name]
    return f"{value:.3g}" if one["figure"] == "strength" else percent(value)
