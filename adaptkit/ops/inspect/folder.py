"""Many files at once: which of them are meant, and in which order."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from adaptkit.errors import InternalError, NoSuchName, WrongUsage
from adaptkit.ops.inspect.run import Options, Report, failed, run
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from adaptkit.ops.stages import Progress

__all__ = ["FIELDS", "SORTS", "ordered", "shortened", "stream", "survey", "where"]

# files read before the rest is estimated: the first compiles the tables of its family
_TRIED = 4
# seconds of work from which on processes pay: one starts in a third of it
_PAYS = 0.6
KILLED = "the system kills what takes too much memory; inspect the file alone"
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

    read = _slim if options.overview else run
    many = _WORKERS > 1 and not (options.stats or options.hash)
    began = perf_counter()
    while len(done) < len(paths):
        done.append(read(paths[len(done)], options))
        tell()
        if len(done) == 1:
            began = perf_counter()
        elif many and len(done) >= _TRIED:
            each = (perf_counter() - began) / (len(done) - 1)
            if each * (len(paths) - len(done)) > _PAYS:
                _spread(paths[len(done) :], options, done, tell)
    return done


def stream(
    paths: Sequence[Path], options: Options, progress: Progress | None = None
) -> Iterator[Report]:
    """Inspect files one after the other: only one report is in memory at a time."""
    told = counting(progress, "reading", len(paths), "files")
    for number, path in enumerate(paths, 1):
        yield run(path, options)
        if told is not None:
            told(number)


# what a table of files shows, selects and orders by; metadata may be megabytes
_SHOWN = frozenset(
    {"path", "error", "hint", "bytes", "kind", "family", "format", "algorithms", "components",
     "ranks", "dtypes", "modules", "problems"}
)  # fmt: skip


def _slim(path: Path, options: Options) -> Report:
    """A report with what a table needs: thousands of them are held at once."""
    report = run(path, options)
    record = {name: value for name, value in report.record.items() if name in _SHOWN}
    if "problems" in record:
        record["problems"] = [{"severity": one["severity"]} for one in record["problems"]]
    return Report(record, error=report.error)


def _spread(
    paths: Sequence[Path], options: Options, done: list[Report], tell: Callable[[int], None]
) -> None:
    """Inspect files here from the first on, and in other processes from the last on."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    size = min(_CHUNK, max(1, len(paths) // (4 * _WORKERS)))
    chunks = [paths[n : n + size] for n in range(0, len(paths), size)]
    # a new process would search headers for cycles as often as Python does by itself
    settings = gc.set_threshold, gc.get_threshold()
    with ProcessPoolExecutor(_WORKERS - 1, get_context("spawn"), *settings) as pool:
        jobs = [pool.submit(_run, list(map(str, chunk)), options) for chunk in reversed(chunks)]
        for chunk, job in zip(chunks, reversed(jobs), strict=True):
            if not job.cancel():
                try:
                    done += job.result()
                except BrokenProcessPool:
                    done += _apart(chunk, options)
                tell(0)
                continue
            for path in chunk:
                done += _run([str(path)], options)
                tell(size * sum(one.done() and not one.cancelled() for one in jobs))


def _run(paths: Sequence[str], options: Options) -> list[Report]:
    read = _slim if options.overview else run
    return [read(Path(path), options) for path in paths]


def _apart(paths: Sequence[Path], options: Options) -> Iterator[Report]:
    """Inspect the files of a process that was killed: the one that kills it again is told apart."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    left = list(paths)
    while left:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            try:
                while left:
                    yield from pool.submit(_run, [str(left[0])], options).result()
                    left.pop(0)
            except BrokenProcessPool:
                error = InternalError("the process that read it was killed", hint=KILLED)
                yield failed(left.pop(0), error)


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
