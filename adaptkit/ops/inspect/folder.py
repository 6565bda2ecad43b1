"""Many files at once: which of them are meant, and in which order."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.ops.inspect.run import Options, Report, run
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from adaptkit.ops.stages import Progress

__all__ = ["FIELDS", "SORTS", "ordered", "shortened", "survey", "where"]

# processes pay from about so many files on: starting one takes as long as reading a hundred
_PARALLEL, _CHUNK = 400, 50
_WORKERS = min(os.cpu_count() or 1, 8)


def survey(
    paths: Sequence[Path], options: Options, progress: Progress | None = None
) -> list[Report]:
    """Inspect files, many of them in several processes; `progress` counts files."""
    done: list[Report] = []
    told = counting(progress, "reading", len(paths), "files")
    for report in _reports(paths, options):
        done.append(report)
        if told is not None:
            told(len(done))
    return done


def _reports(paths: Sequence[Path], options: Options) -> Iterator[Report]:
    if len(paths) < _PARALLEL or _WORKERS < 2 or options.stats or options.hash:
        yield from (run(path, options) for path in paths)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(_WORKERS, get_context("spawn")) as pool:
        jobs = [(str(path), options) for path in paths]
        yield from pool.map(_run, jobs, chunksize=_CHUNK)


def _run(job: tuple[str, Options]) -> Report:
    return run(*job)


def _problems(record: Mapping[str, Any]) -> list[str]:
    return [problem["severity"] for problem in record["problems"]] or ["none"]


# what --where compares, by name: every value that a file has there
FIELDS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[object]]] = {
    "family": lambda record: [record["family"] or "unknown"],
    "format": lambda record: [record["format"] or "unknown"],
    "kind": lambda record: [record["kind"]],
    "algorithm": lambda record: record["algorithms"],
    "part": lambda record: record["components"],
    "rank": lambda record: record["ranks"],
    "dtype": lambda record: record["dtypes"],
    "problems": _problems,
}

SORTS: Mapping[str, Callable[[Report], Any]] = {
    "name": lambda report: report.record["path"].lower(),
    "family": lambda report: (report.record["family"] or "~", report.record["path"].lower()),
    "rank": lambda report: -max(map(int, report.record["ranks"]), default=0),
    "size": lambda report: -report.record["bytes"],
    "date": lambda report: -Path(report.record["path"]).stat().st_mtime,
}


def ordered(reports: Iterable[Report], sort: str | None) -> list[Report]:
    """Sort reports: names and families upwards, the largest ranks and sizes and the newest first.

    Those that could not be read come last.
    """
    if sort is None:
        return list(reports)
    if sort not in SORTS:
        raise NoSuchName.among("order", sort, SORTS)
    held = list(reports)
    good = sorted((report for report in held if report.error is None), key=SORTS[sort])
    return [*good, *(report for report in held if report.error is not None)]


def where(reports: Iterable[Report], conditions: Sequence[str]) -> list[Report]:
    """The reports that fulfil every `FIELD=GLOB`; those that could not be read always do."""
    tests = [_condition(text) for text in conditions]
    return [
        report
        for report in reports
        if report.error is not None or all(test(report.record) for test in tests)
    ]


def _condition(text: str) -> Callable[[Mapping[str, Any]], bool]:
    name, equals, pattern = text.partition("=")
    if not equals:
        raise WrongUsage(f"--where {text!r}: expected FIELD=VALUE, such as family=sdxl")
    field, wanted = name.strip().lower(), pattern.strip().lower()
    if field not in FIELDS:
        raise NoSuchName.among("field of --where", name, FIELDS)
    values = FIELDS[field]
    return lambda record: any(fnmatchcase(str(v).lower(), wanted) for v in values(record))


def shortened(options: Options) -> Options:
    """The options for a table, which shows neither hosts nor keys nor modules."""
    return replace(options, overview=True)
