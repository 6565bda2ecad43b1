"""Output of `batch`: its plan, its progress and its result, as JSON or as text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from adaptkit.cli.show.page import facts, page, table
from adaptkit.cli.show.text import document, human, named, safe, trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops.batch import Preview, Report, Result

__all__ = ["Batched"]


class Batched:
    """Print finished outputs on stdout and the summary on stderr, or one JSON document."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.ended = 0
        # the progress bar replaces sys.stdout, which is right on a terminal but diverts a pipe
        self.out = None if sys.stdout.isatty() else sys.stdout

    def each(self, result: Result) -> None:
        """Print the output of a job that has ended."""
        self.ended += 1
        if result.status == "done" and not self.talk.as_json:
            print(named(result.job.output), file=self.out, flush=True)

    def interrupted(self, total: int) -> None:
        """Print the progress of an interrupted batch."""
        if not self.talk.quiet:
            click.echo(
                f"{self.ended} of {total} jobs have ended; run the same command to continue",
                err=True,
            )

    def finished(self, report: Report) -> int:
        """Print the summary; return 1 if a job failed."""
        if self.talk.as_json:
            document(self.talk.command, report.to_dict())
        elif not self.talk.quiet:
            err = page(stderr=True)
            if self.talk.verbose:
                err.print(
                    table(
                        ("status", "seconds", "size", "command", "output"),
                        _rows(report),
                        right=("seconds",),
                    )
                )
            err.print(facts((name, value) for name, value in _lines(report) if value))
        return _failures(
            report.failures, report.count("done") + report.count("skipped"), report.not_run
        )

    def planned(self, preview: Preview) -> int:
        """Print the plan on stdout; return 1 if a job would fail."""
        if self.talk.as_json:
            document(
                self.talk.command, {"dry_run": True, **preview.to_dict(details=self.talk.verbose)}
            )
        else:
            out = page()
            for plan in preview.plans:
                out.print("would write", plan["output"])
            out.print(facts((name, value) for name, value in _foreseen(preview) if value))
        return _failures(preview.failures, preview.jobs - len(preview.failures), 0)


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    counts = [
        f"{report.count(status)} {status}"
        for status in ("done", "skipped", "failed")
        if report.count(status)
    ]
    left = [f"{report.not_run} not started"] if report.not_run else []
    yield "jobs", " · ".join([*counts, *left])
    yield (
        "written",
        human(written) if (written := sum(result.bytes for result in report.results)) else "",
    )
    yield "log", str(report.log)
    yield "seconds", f"{report.seconds:.1f}"


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for result in report.results:
        done = result.status == "done"
        seconds, size = (f"{result.outcome.seconds:.1f}", human(result.bytes)) if done else ("", "")
        yield result.status, seconds, size, result.job.command, str(result.job.output)


def _foreseen(preview: Preview) -> Iterator[tuple[str, str]]:
    yield (
        "jobs",
        f"{len(preview.plans)} of {preview.jobs}"
        + (f", {preview.skipped} already done" if preview.skipped else ""),
    )
    yield "bytes in", human(preview.total("bytes_in"))
    yield "bytes out", human(preview.bytes_out) + _open(preview.open_sizes)
    yield "peak memory", human(preview.peak_memory)


def _open(count: int) -> str:
    several = "1 output" if count == 1 else f"{count} outputs"
    return f", plus {several} of a size that depends on the weights" if count else ""


def _failures(failures: Sequence[Result], fine: int, left: int) -> int:
    """Print every failed job, and one error line for all."""
    if not failures:
        return 0
    for result in failures:
        shown = f"{result.job.place}, {result.job.output}: {result.outcome.error}"
        click.echo(safe(shown), err=True)
        if result.outcome.hint:
            click.echo(f"  {safe(result.outcome.hint)}", err=True)
    several = "1 job" if len(failures) == 1 else f"{len(failures)} jobs"
    rest = f", {left} were not started" if left else ""
    hint = "pass --keep-going to run the others; finished jobs are not repeated"
    trouble(f"{several} failed, {fine} succeeded{rest}", hint if left else None)
    return 1
