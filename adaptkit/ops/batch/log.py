"""The log of a batch and the hashes of its inputs, next to the recipe.

A job is finished if the log has its output with the same key, and the output still has the
recorded size and time. The key is a SHA-256 of the command, the contents of the inputs and the
options.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit import __version__
from adaptkit.errors import AdaptkitError, CannotWrite, UnreadableFile
from adaptkit.files.header import unreadable
from adaptkit.files.open import open_source
from adaptkit.files.provenance import history, sha256
from adaptkit.ops.verb import verb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adaptkit.ops.batch.recipe import Job

__all__ = ["Ledger"]

LOG, HASHES = ".log.jsonl", ".hashes.jsonl"
# how a line of either file begins
_RECORD = re.compile(rb'\{"(event|path)": "')
# seconds: a younger file may change again without a new time
FRESH = 2.0
# options that do not change the contents of the output
NEUTRAL = frozenset({"output", "overwrite", "device", "memory"})


class Ledger:
    """The log and the hashes of one recipe.

    The files are created by the first line. Without `keep`, hashes are not written.
    """

    def __init__(self, recipe: Path, *, keep: bool = True) -> None:
        self.root, self._keep = recipe.parent, keep
        self.log = recipe.with_name(recipe.name + LOG)
        self._side = recipe.with_name(recipe.name + HASHES)
        # output → record of the last success
        self._done: dict[str, dict[str, Any]] = {}
        # outputs that a run began and did not finish
        self._open: set[str] = set()
        for record in _lines(self.log):
            self._learn(record)
        # hash one file at a time, and none twice
        self._hashing = threading.Lock()
        self._hashes = {str(r.get("path")): r for r in _lines(self._side)}

    def _learn(self, record: Mapping[str, Any]) -> None:
        output, event = record.get("output"), record.get("event")
        if not isinstance(output, str):
            return
        if event == "start":
            self._open.add(output)
        else:
            self._open.discard(output)
        if event == "done" and isinstance(record.get("stamp"), list):
            self._done[output] = dict(record)

    # outputs

    def made(self) -> frozenset[Path]:
        """Return the absolute paths of all outputs that earlier runs wrote or began."""
        return frozenset(_absolute(self.root / name) for name in (*self._done, *self._open))

    def ours(self, job: Job) -> bool:
        """Return whether this recipe wrote or began an output and may replace it.

        If the log lost its line, the output itself tells that it was made of the same inputs.
        """
        name = self.spelled(job.output)
        return name in self._done or name in self._open or _made_by(job)

    def finished(self, job: Job) -> bool:
        """Return whether the output is intact and from the same inputs and options."""
        record = self._done.get(self.spelled(job.output))
        if record is None or record["stamp"] != _stamp(job.output):
            return False
        return bool(record.get("key") == self.key(job))

    # keys

    def key(self, job: Job) -> str:
        """Return a hash of command, options and contents of the inputs, not of their paths."""
        options = {}
        for name, value in job.options.items():
            if name not in NEUTRAL and value != verb(job.command).default(name):
                options[name] = self.content(value) if isinstance(value, Path) else value
        inputs = [[item.role, self.content(item.path), item.strength] for item in job.inputs]
        text = json.dumps([job.command, inputs, options], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self, path: Path) -> str:
        """Return the SHA-256 of a file, or of a folder's or index's names and hashes."""
        files = list(_files(path))
        if len(files) == 1 and files[0][1] == path:
            return self._sha256(path)
        listed = "".join(f"{name}\0{self._sha256(file)}\n" for name, file in files)
        return hashlib.sha256(listed.encode()).hexdigest()

    def signature(self, job: Job) -> list[Any]:
        """Return sizes and times of all inputs; a change during the job spoils its result."""
        return [_stamp(path) for path in job.reads()]

    def _sha256(self, file: Path) -> str:
        with self._hashing:
            return self._hash(file)

    def _hash(self, file: Path) -> str:
        try:
            before = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        name, seen = self.spelled(file), [before.st_size, before.st_mtime_ns]
        known = self._hashes.get(name)
        if known is not None and known.get("seen") == seen:
            return str(known["sha256"])
        record = {"path": name, "seen": seen, "sha256": sha256(file)}
        self._hashes[name] = record
        if self._keep and time.time() - before.st_mtime > FRESH:
            _append(self._side, record)
        return str(record["sha256"])

    # the log

    def start(self, job: Job) -> None:
        """Record the start of a job, which allows replacing its output."""
        self._write(job, {"event": "start"})

    def done(self, job: Job, key: str, report: Mapping[str, Any], seconds: float) -> None:
        """Record a finished job with its inputs."""
        inputs = [
            {"role": item.role, "path": self.spelled(item.path), "sha256": self.content(item.path)}
            | ({} if item.strength is None else {"strength": item.strength})
            for item in job.inputs
        ]
        options = {
            name: self.spelled(value) if isinstance(value, Path) else value
            for name, value in job.options.items()
            if name not in ("output", "overwrite")
        }
        self._write(
            job,
            {
                "event": "done",
                "key": key,
                "inputs": inputs,
                "options": options,
                "report": dict(report),
                "seconds": round(seconds, 3),
                "stamp": _stamp(job.output),
            },
        )

    def failed(self, job: Job, error: str, hint: str | None) -> None:
        """Record a failed job with its error."""
        self._write(job, {"event": "failed", "error": error, "hint": hint})

    def _write(self, job: Job, body: Mapping[str, Any]) -> None:
        where = {"output": self.spelled(job.output), "command": job.command, "place": job.place}
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"event": body["event"], "time": now, **where, **body, "adaptkit": __version__}
        _append(self.log, record, sync=body["event"] == "done")
        self._learn(record)

    def spelled(self, path: Path) -> str:
        """Return a path with `/`, relative to the recipe's folder if inside, which may move."""
        whole, root = _absolute(path), _absolute(self.root)
        return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()


def _made_by(job: Job) -> bool:
    """Whether the last record in an output's metadata is of this command and these inputs."""
    try:
        with open_source(job.output) as source:
            record = (history(source.metadata) or [None])[-1]
    except AdaptkitError:
        return False
    if not isinstance(record, dict) or record.get("command") != job.command:
        return False
    told = json.dumps(record, ensure_ascii=False)
    names = [json.dumps(item.path.name, ensure_ascii=False) for item in job.inputs]
    return all(name in told for name in names)


def _absolute(path: Path) -> Path:
    # does not follow symbolic links
    return Path(os.path.abspath(path))  # noqa: PTH100


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON lines file; skip a truncated line."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(path, error) from error
    for line in lines:
        for part in _apart(line):
            try:
                record = json.loads(part)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _apart(line: bytes) -> list[bytes]:
    """The records of a line: several if one was cut and the next written behind it."""
    starts = [found.start() for found in _RECORD.finditer(line)] or [0]
    return [line[a:b] for a, b in zip(starts, [*starts[1:], len(line)], strict=True)]


def _append(path: Path, record: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append a line in one write, so that lines never mix."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    try:
        with path.open("ab+", buffering=0) as file:
            if (end := file.seek(0, os.SEEK_END)) and (file.seek(end - 1), file.read(1))[
                1
            ] != b"\n":
                line = b"\n" + line
            file.write(line)
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise CannotWrite(f"cannot write the log: {error.strerror or error}", file=path) from error


def _stamp(path: Path) -> list[list[Any]]:
    """Return [name, size, time] of every file of a path; empty if missing."""
    try:
        files = list(_files(path))
        stats = [(name, file.stat()) for name, file in files]
    except (OSError, UnreadableFile):
        return []
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, file) for a file, a folder's visible files, or an index and shards."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                yield name.as_posix(), file
        return
    yield path.name, path
    if path.name.endswith(".index.json"):
        yield from ((name, path.parent / name) for name in _shards(path))


def _shards(index: Path) -> list[str]:
    """Return the files that an index names; an invalid index fails later, on reading."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
