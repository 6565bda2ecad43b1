"""Many files at once: which of them are meant, and in which order."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.ops.inspect.run import Options, Report, run
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from adaptkit.ops.stages import Progress

__all__ = ["FIELDS", "SORTS", "ordered", "shortened", "survey", "where"]

# files read before the rest is estimated: the first compiles the tables of its family
_TRIED = 4
# seconds of work from which on processes pay: one starts in a third of it
_PAYS = 0.6
# files handed to a process at once, at most
_CHUNK = 50
_WORKERS = min(os.cpu_count() or 1, 8)


def survey(
    paths: Sequence[Path], options: Options, progress: Progress | None = None
) -> list[Report]:
    """Inspect files, many of them in several processes; `progress` counts files."""
    done: list[Report] = []
    told = counting(progress, "reading", len(paths), "files")

    def tell(elsewhere: int = 0) -> None:
        if told is not None:
            told(len(done) + elsewhere)

    many = _WORKERS > 1 and not (options.stats or options.hash)
    began = perf_counter()
    while len(done) < len(paths):
        done.append(run(paths[len(done)], options))
        tell()
        if len(done) == 1:
            began = perf_counter()
        elif many and len(done) >= _TRIED:
            each = (perf_counter() - began) / (len(done) - 1)
            if each * (len(paths) - len(done)) > _PAYS:
                _spread(paths[len(done) :], options, done, tell)
    return done


def _spread(
    paths: Sequence[Path], options: Options, done: list[Report], tell: Callable[[int], None]
) -> None:
    """Inspect files here from the first on, and in other processes from the last on."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    size = min(_CHUNK, max(1, len(paths) // (4 * _WORKERS)))
    chunks = [paths[n : n + size] for n in range(0, len(paths), size)]
    with ProcessPoolExecutor(_WORKERS - 1, get_context("spawn")) as pool:
        jobs = [pool.submit(_run, list(map(str, chunk)), options) for chunk in reversed(chunks)]
        for chunk, job in zip(chunks, reversed(jobs), strict=True):
            if not job.cancel():
                done += job.result()
                tell(0)
                continue
            for path in chunk:
                done.append(run(path, options))
                tell(size * sum(one.done() and not one.cancelled() for one in jobs))


def _run(paths: Sequence[str], options: Options) -> list[Report]:
    return [run(path, options) for path in paths]


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
