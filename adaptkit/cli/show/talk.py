"""Output of the writing commands: progress, the plan of a dry run, the summary."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.show.page import facts, page, table
from adaptkit.cli.show.text import MANY, cell, document, human, last, loading, named, safe, trouble
from adaptkit.ops.shared import LeftOut, Unused, by_reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.errors import AdaptkitError
    from adaptkit.ops.many import Done, Foreseen
    from adaptkit.ops.shared import WriterReport
    from adaptkit.ops.stages import Progress
    from adaptkit.ops.verb import Verb

__all__ = ["Talk", "fault", "write", "write_each"]

# keys named per reason
_FEW = 2


def fault(error: AdaptkitError) -> None:
    """Print an error and its hint on stderr."""
    trouble(str(error), error.hint)


class Talk:
    """Print progress and summary on stderr; the path of the output or JSON on stdout."""

    def __init__(self, command: str, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.command, self.as_json, self.quiet, self.verbose = command, as_json, quiet, verbose

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress | None]:
        """Show the stages of the work on stderr; `what` names it before the first one."""
        if self.quiet:
            yield None
            return
        from adaptkit.cli.show.live.stages import shown

        with shown(what) as progress:
            yield progress

    def plan(self, plan: Mapping[str, Any]) -> None:
        """Print the plan of a dry run on stdout, as it is the result."""
        if self.as_json:
            return document(self.command, {"dry_run": True, **plan})
        out = page()
        if self.verbose:
            columns = last(list(plan["details"][0]), "module")
            out.print(table(columns, ([cell(d[c]) for c in columns] for d in plan["details"])))
        out.print("would write", plan["output"])
        out.print(
            facts(
                (name.replace("_", " "), _shown(name, value))
                for name, value in plan.items()
                if _summary(name, value)
            )
        )
        _unused(out, plan["unused"])

    def each(self, done: Sequence[Done]) -> None:
        """Print the outputs on stdout, and the table of all inputs on stderr."""
        if self.as_json:
            return document(self.command, {"files": [one.to_dict() for one in done]})
        for one in done:
            if one.report is not None:
                click.echo(named(one.report.output))
        if not self.quiet:
            rows = [_row(one) for one in done if one.report is not None]
            columns = ("size", "modules", "error", "loads in", "file")
            if rows:
                page(stderr=True).print(table(columns, rows, right=columns[:3]))
            good = len(rows)
            click.echo(f"{good} of {len(done)} written, {sum_of(done)}", err=True)
        for one in done:
            if one.error is not None:
                fault(one.error)

    def foreseen(self, found: Sequence[Foreseen]) -> None:
        """Print the plans of a dry run over many inputs on stdout."""
        if self.as_json:
            return document(
                self.command, {"dry_run": True, "files": [one.to_dict() for one in found]}
            )
        out, good = page(), [one for one in found if one.plan is not None]
        columns = ("size now", "modules", "peak memory", "would write")
        if good:
            out.print(table(columns, map(_planned_row, good), right=columns[:3]))
        out.print(f"{len(good)} of {len(found)} would be written")
        for one in found:
            if one.error is not None:
                fault(one.error)

    def written(
        self,
        report: WriterReport,
        rows: Sequence[tuple[str, str]],
        columns: Sequence[str],
        notes: Sequence[str],
    ) -> None:
        """Print the summary `rows` on stderr and the path of the output on stdout."""
        if self.as_json:
            return document(self.command, report.to_dict())
        click.echo(named(report.output))
        if self.quiet:
            return
        err = page(stderr=True)
        if self.verbose:
            err.print(table(columns, ([cell(d[c]) for c in columns] for d in report.details)))
        if report.measured is not None:
            read = f"read back from the file: relative error {report.measured:.3g}"
            rows = [*rows, ("verified", read)]
        rows = [*rows, ("seconds", f"{report.seconds:.1f}")]
        if report.selection is not None:
            where = next(n for n, row in enumerate(rows) if row[0] in ("modules", "adapters"))
            rows[where] = (rows[where][0], f"{rows[where][1]}\n{report.selection}")
        if report.loads_in is not None:
            rows.append(("loads in", loading(report.to_dict())))
        err.print(facts([row for row in rows if row[1]]))
        _unused(err, [item.to_dict() for item in report.unused])
        for note in notes:
            err.print(f"note: {note}", style="yellow")


def write(
    verb: Verb,
    doing: str,
    show: Callable[[Talk, Any], None],
    *inputs: Any,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Run a writing command: plan, then print the plan (--dry-run) or write and report.

    `doing` labels the progress bar. `show` prints the report. `chosen` are the verb's options.
    """
    talk = Talk(verb.name, as_json, quiet, verbose)
    plan = verb.plan(*inputs, verb.options(**chosen))
    if dry_run:
        return talk.plan(plan.to_dict())
    with talk.progress(doing) as progress:
        report = verb.perform(plan, progress)
    return show(talk, report)


def write_each(
    verb: Verb,
    doing: str,
    show: Callable[[Talk, Any], None],
    adapters: Sequence[Path],
    *,
    suffix: str,
    **chosen: Any,
) -> int:
    """Run a command of one adapter, or on each of several; return the exit code."""
    from adaptkit.ops.many import is_many, plan_many, run_many

    if not is_many(adapters):
        write(verb, doing, show, adapters[0], **chosen)
        return 0
    talk = Talk(verb.name, *(chosen.pop(name) for name in ("as_json", "quiet", "verbose")))
    dry_run, options = chosen.pop("dry_run"), verb.options(**chosen)
    if dry_run:
        with talk.progress("planning") as progress:
            found = plan_many(verb, adapters, options, suffix, progress)
        talk.foreseen(found)
        return 1 if any(one.error for one in found) else 0
    with talk.progress(doing) as progress:
        done = run_many(verb, adapters, options, suffix, progress)
    talk.each(done)
    return 1 if any(one.error for one in done) else 0


def _summary(name: str, value: object) -> bool:
    return name not in ("details", "unused", "output") and value not in ("", None, [])


def _row(one: Done) -> tuple[str, ...]:
    report = one.report
    assert report is not None
    lost = "?" if report.relative_error is None else f"{report.relative_error:.3g}"
    hosts = [host for host, loads in (report.loads_in or {}).items() if loads]
    told = ", ".join(hosts) or "no host known"
    return human(report.bytes), str(report.modules), lost, told, one.name


def _planned_row(one: Foreseen) -> tuple[str, ...]:
    plan = one.plan
    assert plan is not None
    sizes = human(plan["bytes_in"]), str(plan["modules"]), human(plan["peak_memory"])
    return (*sizes, str(plan["output"]))


def sum_of(done: Sequence[Done]) -> str:
    """The bytes of all outputs."""
    return human(sum(one.report.bytes for one in done if one.report is not None))


def _shown(name: str, value: object) -> str:
    if name == "selection":
        return str(LeftOut(*value.values()))  # type: ignore[attr-defined]
    if isinstance(value, int) and ("bytes" in name or "memory" in name):
        return human(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(map(safe, value))
    if isinstance(value, list):
        return "\n".join(
            f"{item['path']} × {item['strength']:g}: {item['modules']} modules" for item in value
        )
    return str(value)


def _unused(out: Any, unused: Sequence[Mapping[str, str]]) -> None:
    """Print the unused keys by reason: their number and the first of them."""
    groups = by_reason([Unused(item["key"], item["reason"]) for item in unused])
    for items in list(groups.values())[:MANY]:
        keys, reason = [item.key for item in items], items[0].reason
        count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
        out.print(f"  {count} not used: {reason}", style="yellow")
        more = f", and {len(keys) - _FEW} more (see --json)" if len(keys) > _FEW else ""
        out.print("    " + ", ".join(keys[:_FEW]) + more)
    if len(groups) > MANY:
        out.print(f"  and {len(groups) - MANY} more reasons (see --json)", style="yellow")
