"""Output files: written under a hidden name, renamed when complete."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import CorruptFile
from adaptkit.files._exchange import rename_new
from adaptkit.files.header import unreadable
from adaptkit.files.leftovers import forget, hidden, lock, remove_dead
from adaptkit.files.publish import cannot_write, check_target, sync_folder

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["OutputFile", "Run", "coalesce"]

HAS_PWRITE = hasattr(os, "pwrite")
HAS_PREADV = hasattr(os, "preadv")
HAS_COPY_FILE_RANGE = hasattr(os, "copy_file_range")
HAS_FADVISE = hasattr(os, "posix_fadvise")
# bytes per system call; Linux and macOS refuse or truncate calls of 2 GiB and more
_CHUNK = 1 << 30
# fits the processor's cache: 256 KiB to 4 MiB are equally fast, larger buffers are slower
_COPY_BUFFER = 2 << 20
_BLOCK = 4096  # bytes: the unit in which file systems share extents (reflink)
_MUCH = 16 << 20  # bytes: from here on two threads copy faster than one
_LARGE = 1 << 29  # bytes: larger files would displace everything else from the page cache
_WINDOW = 32 << 20  # bytes flushed to the disk at a time


class Run(NamedTuple):
    """Bytes to copy to offset `at` of the output.

    The bytes are `source[start : start + length]`.
    """

    source: Path
    start: int
    length: int
    at: int
    tensor: str


class _Flusher:
    """Flushes a large file while it is written, and frees its cache pages.

    Otherwise dirty pages fill the cache, displace the base of the next merge, and make the final
    fsync wait for gigabytes. Does nothing on systems without posix_fadvise.
    """

    def __init__(self, size: int) -> None:
        self._on = HAS_FADVISE and size >= _LARGE
        self._lock = threading.Lock()
        self._fresh: list[tuple[int, int]] = []
        self._sent: list[tuple[int, int]] = []
        self._bytes = 0

    def wrote(self, file: io.FileIO, at: int, length: int) -> None:
        """Record a write; flush once a window is full."""
        if not self._on:
            return
        with self._lock:
            self._fresh.append((at, length))
            self._bytes += length
            if self._bytes < _WINDOW:
                return
            sent, self._sent, self._fresh, self._bytes = self._sent, self._fresh, [], 0
            fresh = self._sent
        # DONTNEED starts writing dirty pages back and drops clean ones: each span is passed twice
        with suppress(OSError):
            for span in (*fresh, *sent):
                os.posix_fadvise(file.fileno(), *span, os.POSIX_FADV_DONTNEED)


class OutputFile:
    """A file of known size, written at any offset from any thread.

    Bytes go to a hidden temporary file in the folder of `path`. `publish` syncs and renames it;
    `abort`, or leaving the `with` block, removes it.

    Raises `WouldOverwrite`, or `CannotWrite` for a missing folder, no permission or a full disk.
    """

    def __init__(self, path: str | Path, size: int, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.size = size
        self.overwrite = overwrite
        # told how many bytes more are written, from any thread
        self.wrote: Callable[[int], None] = lambda _: None
        self._state = threading.Condition()
        self._writing = 0
        self._file: io.FileIO | None = None
        self._cause: BaseException | None = None  # the failure that closed the file
        self._flusher = _Flusher(size)
        check_target(self.path, size, overwrite)
        remove_dead(self.path)
        self._temporary = hidden(self.path)
        try:
            with self._os_errors():
                self._file = self._temporary.open("x+b", buffering=0)  # mode 0666 less the umask
                lock(self._file)
                # the final size first: writes come in any order
                self._file.truncate(size)
        except BaseException:
            self.abort()
            raise

    def publish(self, *, sync: bool = True) -> None:
        """Sync the file and rename it to `path`."""
        try:
            if self._file is None:
                raise RuntimeError("the file is closed")
            file = self._close()
            assert file is not None
            with self._os_errors(), file:
                if sync:
                    # data must be on the disk before the rename is, or a power failure leaves zeros
                    os.fsync(file.fileno())
            with self._os_errors():
                if self.overwrite:
                    self._temporary.replace(self.path)
                else:
                    # another process may have created it meanwhile: neither is lost
                    rename_new(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        forget(self._temporary)
        if sync:
            sync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove what was written, after pending writes. Does nothing after `publish`."""
        file = self._close()
        if file is not None:
            with suppress(OSError):
                file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        # also if it is still there: a later run of this process may remove it
        forget(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    @contextmanager
    def _open_file(self) -> Iterator[io.FileIO]:
        """Keep the file open during the block.

        A write to a closed descriptor that the system has reused would hit another file.
        """
        with self._state:
            if self._file is None:
                # whichever thread comes next tells what went wrong in another
                raise self._cause or RuntimeError("the file is closed")
            self._writing += 1
            file = self._file
        try:
            with self._os_errors():
                yield file
        finally:
            with self._state:
                self._writing -= 1
                self._state.notify_all()

    def _close(self) -> io.FileIO | None:
        """Detach the file once no write is pending."""
        with self._state:
            self._state.wait_for(lambda: self._writing == 0)
            file, self._file = self._file, None
        return file

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = cannot_write(self.path, error, self.size)
            self._cause = self._cause or told
            raise told from error

    def _write(self, data: memoryview, at: int) -> None:
        with self._open_file() as file:
            self._write_to(file, data, at)

    def _read(self, length: int, at: int, tensor: str) -> memoryview:
        """Read bytes that were written; `CorruptFile` if the file was truncated meanwhile."""
        done = 0
        buffer = memoryview(bytearray(length))
        with self._open_file() as file:
            while done < length:
                count = self._read_some(file, buffer[done:], at + done)
                if not count:
                    raise CorruptFile(
                        "the file was truncated while it was written", file=self.path, tensor=tensor
                    )
                done += count
        return buffer

    def _write_to(self, file: io.FileIO, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            count = self._some(file, data[done : done + _CHUNK], at + done)
            self._flusher.wrote(file, at + done, count)
            self.wrote(count)
            done += count

    def _some(self, file: io.FileIO, data: memoryview, at: int) -> int:
        if HAS_PWRITE:
            return os.pwrite(file.fileno(), data, at)
        with self._state:
            file.seek(at)
            return file.write(data) or 0

    def _read_some(self, file: io.FileIO, buffer: memoryview, at: int) -> int:
        with nullcontext() if HAS_PREADV else self._state:
            return _read_at(file, buffer, at)

    def _copy_runs(self, runs: Sequence[Run]) -> None:
        """Copy with two threads if it pays: one reads while the other writes."""
        if len(runs) < 2 or sum(run.length for run in runs) < _MUCH:
            return self._copy_each(runs)
        failed: list[BaseException] = []

        def copy(part: Sequence[Run]) -> None:
            try:
                self._copy_each(part)
            except BaseException as error:
                failed.append(error)
                self._cause = self._cause or error
                self.abort()  # stops the other thread too

        helper = threading.Thread(target=copy, args=(runs[1::2],), daemon=True)
        helper.start()
        copy(runs[::2])
        helper.join()
        if failed:
            raise failed[0]
        return None

    def _copy_each(self, runs: Sequence[Run]) -> None:
        for path, group in _by_file(runs).items():
            self._copy_file(path, group)

    def _copy_file(self, path: Path, runs: Iterable[Run]) -> None:
        try:
            source = path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(path, error) from error
        with source:
            buffer = memoryview(bytearray(_COPY_BUFFER))
            for run in runs:
                done = self._copy_in_kernel(source, run)
                if done < run.length:
                    self._copy_by_hand(source, run, done, buffer)

    def _copy_in_kernel(self, source: io.FileIO, run: Run) -> int:
        """Copy with copy_file_range, which shares extents on some file systems; bytes copied.

        Only for offsets that agree modulo the block size. The kernel copies anything else page by
        page, which takes twice the time of the loop in `_copy_by_hand` (ext4, Linux 6.18).
        """
        done = 0
        if (run.start - run.at) % _BLOCK:
            return done
        while HAS_COPY_FILE_RANGE and done < run.length:
            count = min(run.length - done, _WINDOW)
            # reopened for every window, so that `abort` need not wait for the whole run
            with self._open_file() as file:
                try:
                    copied = os.copy_file_range(
                        source.fileno(), file.fileno(), count, run.start + done, run.at + done
                    )
                except OSError as error:
                    # EDQUOT is missing on Windows
                    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
                        raise
                    # another file system, an old kernel, a sandbox: real faults show up below
                    break
                # a truncated source: the loop in `_copy_by_hand` reports it
                if copied == 0:
                    break
                self._flusher.wrote(file, run.at + done, copied)
                self.wrote(copied)
                done += copied
        return done

    def _copy_by_hand(self, source: io.FileIO, run: Run, done: int, buffer: memoryview) -> None:
        while done < run.length:
            with self._open_file() as file:
                until = min(run.length, done + _WINDOW)
                while done < until:
                    try:
                        count = _read_at(source, buffer[: until - done], run.start + done)
                    except OSError as error:
                        raise unreadable(run.source, error).at(tensor=run.tensor) from error
                    if count == 0:
                        missing = run.length - done
                        message = f"truncated: {missing} bytes are missing at {run.start + done}"
                        raise CorruptFile(message, file=run.source, tensor=run.tensor)
                    self._write_to(file, buffer[:count], run.at + done)
                    done += count


def _read_at(file: io.FileIO, buffer: memoryview, at: int) -> int:
    if HAS_PREADV:
        return os.preadv(file.fileno(), [buffer], at)
    file.seek(at)
    return file.readinto(buffer) or 0


def coalesce(runs: Iterable[Run]) -> list[Run]:
    """Join runs that are adjacent in both files."""
    joined: list[Run] = []
    # by output offset: the disk is written forwards
    for run in sorted(runs, key=lambda run: run.at):
        last = joined[-1] if joined else None
        if last and _follows(last, run):
            joined[-1] = last._replace(length=last.length + run.length)
        elif run.length:
            joined.append(run)
    return joined


def _follows(last: Run, run: Run) -> bool:
    places = last.start + last.length, last.at + last.length
    return last.source == run.source and places == (run.start, run.at)


def _by_file(runs: Iterable[Run]) -> dict[Path, list[Run]]:
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.source, []).append(run)
    return groups
