"""Report → rich table or JSON. The only place that knows either."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from adaptkit import __version__
from adaptkit.cli.show.page import Words, console, facts, page, table

if TYPE_CHECKING:
    from adaptkit.ops import combine, convert, extract, inspect, merge, resize
    from adaptkit.ops.merge.verify import Verified

__all__ = ["Talk", "human", "inspected", "listed"]

_NARROW = 76  # characters in one cell of a table; longer ones get lines of their own
_FEW = 2  # keys named per reason
_LOSSY = 0.1  # of ‖ΔW‖ lost to rounding: said aloud
_MANY = 12  # of a thing are listed, then "and n more"
_MEASURED = {
    "algorithm": "algorithm",
    "rank": "rank",
    "norm": "‖ΔW‖",
    "spectral_norm": "σ₁",
    "stable_rank": "stable",
    "rank_90": "r90",
    "rank_99": "r99",
    "module": "module",
}


def document(command: str, body: Mapping[str, Any]) -> None:
    """Print exactly one JSON document on stdout."""
    click.echo(
        json.dumps(
            {"adaptkit": __version__, "command": command, **body}, ensure_ascii=False, indent=2
        )
    )


def human(count: float) -> str:
    """Bytes as people write them, powers of 1000: 151.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _counts(counts: Mapping[str, int], form: str = "{0} {1}") -> str:
    shown = [form.format(name, n) for name, n in list(counts.items())[:_MANY]]
    more = len(counts) - _MANY
    return " · ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def _percent(share: float) -> str:
    """A share, with as many digits as it needs to be told from 0 and 1."""
    if share in (0.0, 1.0) or 0.001 <= share <= 0.999:
        return f"{share:.1%}"
    return f"{share:.2e}" if share < 0.001 else f"{share:.4%}"


# inspect ---------------------------------------------------------------------------------------------------------


def inspected(
    reports: Sequence[inspect.Report], *, keys: bool, modules: bool, as_json: bool, quiet: bool
) -> None:
    """Show what `inspect` found: one file in full, several as a table; errors on stderr."""
    if as_json:
        document("inspect", {"files": [_with_lists(report, keys, modules) for report in reports]})
    elif not quiet:
        _show(reports, keys, modules)
    for report in reports:
        if report.error is not None:
            click.echo(click.style("error:", fg="red", bold=True) + f" {report.error}", err=True)
            if report.error.hint:
                click.echo(
                    click.style("hint:", fg="cyan", bold=True) + f" {report.error.hint}", err=True
                )


def _with_lists(report: inspect.Report, keys: bool, modules: bool) -> dict[str, Any]:
    record = report.to_dict()
    if report.error is None and keys:
        record["keys"] = list(report.keys)
    if report.error is None and modules:
        record["module_list"] = list(report.modules)
    return record


def _show(reports: Sequence[inspect.Report], keys: bool, modules: bool) -> None:
    good = [report for report in reports if report.error is None]
    if len(reports) > 1 and not (
        keys or modules or any("blocks" in report.record for report in good)
    ):
        return _overview(good)
    for report in good:
        _file(report)
        if report.record.get("blocks"):
            _blocks(report)
        if modules:
            _modules(report)
        if keys:
            _keys(report)


def _overview(reports: Sequence[inspect.Report]) -> None:
    if not reports:
        return
    rows = [
        (
            human(r["bytes"]),
            r["kind"],
            r["family"] or "?",
            r["format"] or "",
            _counts(r["algorithms"]),
            " ".join(list(r["ranks"])[:4]) + (" …" if len(r["ranks"]) > 4 else ""),
            f"{len(r['problems'])}" if r["problems"] else "",
            PurePath(r["path"]).name,
        )
        for r in (report.record for report in reports)
    ]
    columns = ("size", "kind", "family", "format", "modules", "rank", "problems", "file")
    page().print(table(columns, rows, right=("size",)))


def _file(report: inspect.Report) -> None:
    record = report.record
    out = page()
    out.print(
        Words(PurePath(record["path"]).name, "bold"),
        Words(f"{record['kind']}, {human(record['bytes'])}"),
    )
    out.print(facts((name, value) for name, value in _lines(record) if value))
    for problem in record["problems"][:_MANY]:
        where = f"{problem['module']}: " if problem["module"] else ""
        style = "red" if problem["severity"] == "error" else "yellow"
        out.print(Words(f"  {problem['severity']}:", style), Words(f"{where}{problem['what']}"))
    if len(record["problems"]) > _MANY:
        out.print(
            f"  and {len(record['problems']) - _MANY} more problems (see --json)", style="yellow"
        )


def _lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    evidence = record["evidence"]
    alike = (
        f"  (or {', '.join(evidence['alternatives'])}: the names do not tell)"
        if evidence["alternatives"]
        else ""
    )
    yield "family", (record["family"] or "unknown") + alike
    yield "format", record["format"] or ""
    yield "layout", record.get("layout", "")
    yield "algorithms", _counts(record["algorithms"])
    yield "parts", _counts(record["components"])
    yield "ranks", _counts(record["ranks"], "{0} (×{1})")
    if record["scales"]:
        origin = {
            "none": "no alpha stored",
            "tensor": "alpha from tensors",
            "metadata": "alpha from metadata",
        }
        stated = origin.get(record["alpha_source"], "alpha from tensors and metadata")
        yield (
            "scales",
            f"{_counts(record['scales'], '{0} (×{1})')}"
            + (f", {stated}" if record["ranks"] else ""),
        )
    yield "parameters", f"{record['parameters']:,}"
    yield "dtypes", _counts(record["dtypes"], "{0} (×{1})")
    yield "keys", f"{evidence['claimed']} of {evidence['total']} claimed"
    yield "loads in", _loads_in(record)
    yield "sha256", record.get("sha256", "")
    yield "metadata", _metadata(record["metadata"])


def _loads_in(record: Mapping[str, Any]) -> str:
    """One line a host: yes, or why not."""
    words = {True: "yes", False: "no", None: "?"}
    found = record.get("loads_in") or {}
    lines = (f"{host}: {words[loads]}{_because(record, host)}" for host, loads in found.items())
    return "\n".join(lines)


def _because(record: Mapping[str, Any], host: str) -> str:
    why = record.get("why", {}).get(host, "")
    return f" – {why}" if why else ""


def _metadata(metadata: Mapping[str, str]) -> str:
    shown = (
        "modelspec.title",
        "modelspec.architecture",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
    )
    found = [f"{name} = {metadata[name]}" for name in shown if name in metadata]
    rest = len(metadata) - len(found) - ("format" in metadata)  # format=pt says nothing
    return "\n".join(
        [*found, *([f"{'and ' if found else ''}{rest} more (see --json)"] if rest else [])]
    )


def _blocks(report: inspect.Report) -> None:
    """Strength and rank of every block, as a heat map."""
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
    columns = _last(list(report.modules[0]), "module")
    page().print(table(columns, ([_cell(m[c]) for c in columns] for m in report.modules)))


def _measured(modules: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [f"{m[c]:.3g}" if isinstance(m[c], float) else m[c] for c in _MEASURED] for m in modules
    ]
    columns = list(_MEASURED.values())
    out = page()
    out.print()
    out.print(table(columns, rows, right=columns[1:-1]))


def _last(columns: list[str], name: str) -> list[str]:
    """The long column goes last: where a terminal is narrow, only that one folds."""
    return [*(c for c in columns if c != name), name]


def _cell(value: object) -> object:
    if isinstance(value, list):
        return "×".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else value


def _keys(report: inspect.Report) -> None:
    rows = (
        (k["dtype"], "×".join(map(str, k["shape"])) or "scalar", k["key"], k["note"])
        for k in report.keys
    )
    page().print(table(("dtype", "shape", "key", "note"), rows))


# formats, families, algorithms -----------------------------------------------------------------------------------


def listed(kind: str, rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Show one of the tables of what this version knows."""
    if as_json:
        return document(kind, {kind: [dict(row) for row in rows]})
    columns = list(rows[0])
    shown = [[_plain(row[c]) for c in columns] for row in rows]
    if all(len(cell) <= _NARROW for row in shown for cell in row):
        page().print(table([c.replace("_", " ") for c in columns], shown))
        return
    for name, title, *rest in shown:
        page().print(Words(name, "bold"), Words(title))
        page().print(
            facts(
                (c.replace("_", " "), cell)
                for c, cell in zip(columns[2:], rest, strict=True)
                if cell
            )
        )


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_plain(title)}" for name, title in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# writers ---------------------------------------------------------------------------------------------------------


class Talk:
    """What a writing command says: progress and summary on stderr, the output's path or one JSON document on stdout."""

    def __init__(self, command: str, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.command, self.as_json, self.quiet, self.verbose = command, as_json, quiet, verbose

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """A bar on stderr, on a terminal only."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def plan(self, plan: Mapping[str, Any]) -> None:
        """The plan of a dry run, on stdout: it is what was asked for."""
        if self.as_json:
            return document(self.command, {"dry_run": True, **plan})
        out = page()
        if self.verbose:
            columns = _last(list(plan["details"][0]), "module")
            out.print(table(columns, ([_cell(d[c]) for c in columns] for d in plan["details"])))
        out.print("would write", plan["output"])
        out.print(
            facts(
                (name.replace("_", " "), _shown(name, value))
                for name, value in plan.items()
                if _summary(name, value)
            )
        )
        _unused(out, plan["unused"])

    def extracted(self, report: extract.Report) -> None:
        """Summary of an extraction."""
        same = report.captured_by_lora_of_same_size
        rows = [
            (
                "adapter",
                f"{report.algorithm} for {report.family}, {report.format} keys, {human(report.bytes)}",
            ),
            ("modules", f"{report.modules} written, {report.unchanged} unchanged and left out"),
            (
                "captured",
                f"{_percent(report.captured)} of ‖ΔW‖², relative error {report.relative_error:.3g}",
            ),
            (
                "same size",
                ""
                if same is None
                else f"a LoRA of as many parameters would capture {_percent(min(1.0, same))}",
            ),
        ]
        columns = ("algorithm", "rank", "captured", "relative_error", "module")
        self._written(report, rows, columns, report.notes)

    def converted(self, report: convert.Report) -> None:
        """Summary of a conversion."""
        rows = [
            (
                "adapter",
                f"{report.family}, {report.source_format} → {report.format} keys, {human(report.bytes)}",
            ),
            ("modules", f"{report.modules}: {_counts(report.changes, '{1} {0}')}"),
            ("weights", self._error(report.relative_error)),
        ]
        self._written(
            report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
        )

    def resized(self, report: resize.Report) -> None:
        """Summary of a resize."""
        ranks = Counter(str(d["rank"]) for d in report.details if d["rank"])
        rows = [
            ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
            ("modules", f"{report.modules}: {_counts(report.changes, '{1} {0}')}"),
            (
                "ranks",
                _counts(dict(sorted(ranks.items(), key=lambda item: int(item[0]))), "{0} (×{1})"),
            ),
            ("weights", self._error(report.relative_error)),
        ]
        self._written(
            report,
            rows,
            ("algorithm", "rank_before", "rank", "relative_error", "module"),
            report.notes,
        )

    def combined(self, report: combine.Report, inputs: Sequence[tuple[str, float]]) -> None:
        """Summary of a combination."""
        ranks = Counter(str(d["rank"]) for d in report.details if d["rank"])
        kinds = Counter(d["algorithm"] for d in report.details)
        rows = [
            ("inputs", "\n".join(f"{PurePath(path).name} × {weight:g}" for path, weight in inputs)),
            ("adapter", f"{report.family}, {report.format} keys, {human(report.bytes)}"),
            ("modules", f"{report.modules}: {_counts(kinds)}"),
            (
                "ranks",
                _counts(dict(sorted(ranks.items(), key=lambda item: int(item[0]))), "{0} (×{1})"),
            ),
            ("weights", self._error(report.relative_error)),
        ]
        self._written(
            report, rows, ("algorithm", "rank", "change", "relative_error", "module"), report.notes
        )

    @staticmethod
    def _error(error: float) -> str:
        return "exact" if error == 0 else f"relative error {error:.3g}"

    def merged(self, report: merge.Report) -> None:
        """Summary of a merge."""
        each = "\n".join(
            f"{PurePath(a['path']).name} × {a['strength']:g}: {a['modules']} modules"
            for a in report.adapters
        )
        rows = [
            ("adapters", each),
            (
                "tensors",
                f"{report.tensors_changed} of {report.tensors} changed, ‖ΔW‖/‖W‖ = {report.relative_change:.3g} over them",
            ),
            ("blocks", _strongest(report.blocks)),
            ("weights", "\n".join(_weighted(report.block_weights))),
            ("rounding", f"{report.relative_error:.3g} of ‖ΔW‖ lost to the number format"),
            ("verified", _verified(report.verified)),
            ("files", _counts(dict.fromkeys(report.files, 0), "{0}")),
            ("size", human(report.bytes)),
        ]
        notes = [
            f"not in the output: {path} (weights once more, without the merge)"
            for path in report.left_out
        ]
        notes += report.notes
        if report.relative_error > _LOSSY:
            wider = "bf16 or fp16" if report.quantised else "fp32"
            which = f" ({report.quantised} tensors are fp8)" if report.quantised else ""
            notes.append(
                f"rounding is {report.relative_error:.0%} of ‖ΔW‖{which}: --dtype {wider} keeps more of it"
            )
        self._written(
            report, rows, ("algorithm", "rank", "strength", "relative_change", "module"), notes
        )

    def _written(
        self,
        report: Any,
        rows: Sequence[tuple[str, str]],
        columns: Sequence[str],
        notes: Sequence[str],
    ) -> None:
        if self.as_json:
            return document(self.command, report.to_dict())
        click.echo(str(report.output))
        if self.quiet:
            return
        err = page(stderr=True)
        if self.verbose:
            err.print(table(columns, ([_cell(d[c]) for c in columns] for d in report.details)))
        err.print(facts([row for row in (*rows, ("seconds", f"{report.seconds:.1f}")) if row[1]]))
        _unused(err, [item.to_dict() for item in report.unused])
        for note in notes:
            err.print(f"note: {note}", style="yellow")


def _strongest(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The blocks that changed most: ‖ΔW‖/‖W‖ of each."""
    changed = [block for block in blocks if block["tensors_changed"]]
    first = sorted(changed, key=lambda block: -(block["relative_change"] or 0.0))[:3]
    shown = " · ".join(f"{b['block']} {b['relative_change'] or 0.0:.3g}" for b in first)
    return f"{len(changed)} of {len(blocks)} changed, most: {shown}" if changed else ""


def _weighted(rules: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each rule of --blocks got; the neighbours of a vector that have one weight on one line."""
    for weight, group in groupby(rules, key=lambda rule: (rule["weight"], rule.get("vector"))):
        held = list(group)
        for part in [held] if weight[1] else [[rule] for rule in held]:
            names = " ".join(rule["rule"] for rule in part)
            yield f"{names} = {weight[0]:g}: {sum(rule['modules'] for rule in part)} modules"


def _verified(found: Verified | None) -> str:
    if found is None:
        return ""
    return f"{found.merged} tensors are base + ΔW within one rounding, {found.copied} are the base's bytes"


def _summary(name: str, value: object) -> bool:
    return name not in ("details", "unused", "output") and value not in ("", None, [])


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and ("bytes" in name or "memory" in name):
        return human(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list):
        return "\n".join(
            f"{item['path']} × {item['strength']:g}: {item['modules']} modules" for item in value
        )
    return str(value)


def _unused(out: Any, unused: Sequence[Mapping[str, str]]) -> None:
    """Keys not used, by reason: how many, and which come first."""
    groups: dict[str, list[str]] = {}
    for item in unused:
        groups.setdefault(item["reason"], []).append(item["key"])
    for reason, keys in list(groups.items())[:_MANY]:
        count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
        out.print(f"  {count} not used: {reason}", style="yellow")
        more = f", and {len(keys) - _FEW} more (see --json)" if len(keys) > _FEW else ""
        out.print("    " + ", ".join(keys[:_FEW]) + more)
    if len(groups) > _MANY:
        out.print(f"  and {len(groups) - _MANY} more reasons (see --json)", style="yellow")
