"""Positioned reads from a file, from any thread, and what tells that the file has changed."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import AdaptkitError, CorruptFile
from adaptkit.files.header import unreadable

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Reader", "Stamp", "stamp"]

HAS_PREADV = hasattr(os, "preadv")
HAS_FADVISE = hasattr(os, "posix_fadvise")
_CHUNK = 1 << 30  # bytes per system call; macOS and Linux refuse or truncate reads of 2 GiB


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    time: int
    inode: int


def stamp(found: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


class Reader:
    """Positioned reads from one file, opened at the first read."""

    def __init__(self, path: Path, size: int, stamp: Stamp) -> None:
        self.path = path
        self.size = size
        self._stamp = stamp  # of the file whose header was read
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()
        self._busy = 0  # reads in flight

    def into(self, view: memoryview, start: int, tensor: str) -> None:
        """Fill `view` with the bytes from `start` on; `CorruptFile` at a premature end."""
        # as `_using` does, without its generator: a file has an alpha for every module
        with self._lock:
            self._busy += 1
        try:
            self._fill(self._opened(), view, start, tensor)
        finally:
            with self._lock:
                self._busy -= 1

    @contextmanager
    def _using(self) -> Iterator[io.FileIO]:
        """The open file, which `park` leaves open meanwhile."""
        with self._lock:
            self._busy += 1
        try:
            yield self._opened()
        finally:
            with self._lock:
                self._busy -= 1

    def park(self) -> None:
        """Close the file unless it is being read; the next read opens it again."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._busy and self._file is not None:
                    self._file.close()
                    self._file = None
                    _POOL.forget(self)
            finally:
                self._lock.release()

    def _fill(self, file: io.FileIO, view: memoryview, start: int, tensor: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = self._some(file, view[done : done + _CHUNK], start + done)
            except (OSError, ValueError) as error:  # ValueError: closed in another thread
                reason = error if isinstance(error, OSError) else OSError(str(error))
                raise unreadable(self.path, reason).at(tensor=tensor) from error
            if count == 0:
                message = f"truncated: {len(view)} bytes expected at {start}, {done} found"
                raise CorruptFile(
                    message, file=self.path, tensor=tensor, hint="did the file change meanwhile?"
                )
            done += count
        self._check(os.fstat(file.fileno()), tensor)

    def check_unchanged(self) -> None:
        """Raise `CorruptFile` if another file has the name now, or this one was written to."""
        try:
            self._check(self.path.stat())
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _check(self, now: os.stat_result, tensor: str | None = None) -> None:
        if stamp(now) != self._stamp:
            raise CorruptFile(
                "it was replaced or written to while it was read",
                file=self.path,
                tensor=tensor,
                hint="run the command again when the file is complete",
            )

    def _some(self, file: io.FileIO, view: memoryview, start: int) -> int:
        if HAS_PREADV:
            return os.preadv(file.fileno(), [view], start)
        with self._lock:
            # no positioned reads (Windows): the file offset is shared, hence the lock
            file.seek(start)
            return file.readinto(view) or 0

    def ahead(self, start: int, length: int) -> None:
        """Prefetch bytes from the disk, on systems with posix_fadvise."""
        if HAS_FADVISE:
            # the read itself will report a fault
            with suppress(OSError, AdaptkitError), self._using() as file:
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> io.FileIO:
        with self._lock:
            if self._file is None:
                try:
                    file = _open_raw(self.path)
                except OSError as error:
                    raise unreadable(self.path, error) from error
                # offsets come from the header read earlier
                now = os.fstat(file.fileno())
                if now.st_size != self.size:
                    file.close()
                    message = f"changed after opening: it had {self.size} bytes, now {now.st_size}"
                    raise CorruptFile(message, file=self.path)
                try:
                    self._check(now)
                except CorruptFile:
                    file.close()
                    raise
                self._file = file
                _POOL.hold(self)
            return self._file

    def close(self) -> None:
        """Free the file handle."""
        with self._lock:
            file, self._file = self._file, None
            _POOL.forget(self)
        if file is not None:
            file.close()


class _Pool:
    """Readers that hold an open file: a model of 500 shards exceeds what a process may open.

    macOS lets a process have 256 files open. Most of them are left to imports, outputs and logs.
    """

    most = 100

    def __init__(self) -> None:
        self._open: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._lock = threading.Lock()

    def hold(self, reader: Reader) -> None:
        with self._lock:
            self._open.add(reader)

    def forget(self, reader: Reader) -> None:
        with self._lock:
            self._open.discard(reader)

    def make_room(self, most: int = most) -> None:
        """Close the files that nobody reads, if at least `most` are open."""
        with self._lock:
            readers = list(self._open)
        if len(readers) >= most:
            for reader in readers:
                reader.park()


_POOL = _Pool()


def _open_raw(path: Path) -> io.FileIO:
    """Open a file; if too many are open, close those that nobody reads."""
    _POOL.make_room()
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    _POOL.make_room(0)
    return path.open("rb", buffering=0)
