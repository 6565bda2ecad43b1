"""Writing a safetensors file: header first, then every tensor in its place, published whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import CannotWrite, CorruptFile, NoSuchName, ShapeMismatch, WouldOverwrite
from adaptkit.files._exchange import exchange
from adaptkit.files.header import TORCH_NAMES, TensorSpec, build_header, unreadable

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
    from types import TracebackType
    from typing import Self

    import torch

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource

__all__ = ["Pieces", "Spool", "TensorSink", "check_folder", "publish_folder"]

HAS_PWRITE = hasattr(os, "pwrite")
HAS_COPY_FILE_RANGE = hasattr(os, "copy_file_range")
HAS_FADVISE = hasattr(os, "posix_fadvise")
_CHUNK = 1 << 30  # bytes per system call; some systems refuse or cut 2 GiB and more
HAS_PREADV = hasattr(os, "preadv")
_COPY_BUFFER = (
    2 << 20
)  # stays in the processor's cache: of 256 KiB to 32 MiB, up to 4 MiB are alike, more is slower
_BLOCK = 4096  # bytes: what file systems that share blocks between files share
_MUCH = 16 << 20  # bytes that two threads copy in less time than one
_LARGE = 1 << 29  # bytes: a file from here on does not stay in the system's cache
_WINDOW = 32 << 20  # bytes of it that are sent to the disk at a time

_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


class _Run(NamedTuple):
    """Bytes to copy: `source[start : start + length]` to `at` in the output."""

    source: Path
    start: int
    length: int
    at: int
    tensor: str


def _cannot_write(path: Path, error: OSError, needed: int) -> CannotWrite:
    """The `CannotWrite` that says what the operating system said, and what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return CannotWrite(
            f"the disk is full: {needed} bytes are needed", file=path, hint="free space or use -o"
        )
    if isinstance(error, PermissionError):
        hint = "check the mode of the folder; on Windows, close whatever holds the file open"
        return CannotWrite("no permission to write here", file=path, hint=hint)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if error.errno == errno.EROFS:
        return CannotWrite("the disk is read-only", file=path, hint="choose another output with -o")
    return CannotWrite(f"cannot be written: {error.strerror or error}", file=path)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; copies only what is not contiguous on the CPU."""
    import torch

    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = whole.as_strided(
        (whole.numel(),), (1,)
    )  # a dimension of size 1 may have any stride, which view() refuses
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, _DTYPES.get(dtype, dtype), tuple(tensor.shape))


class _Trail:
    """Sends a large file to the disk while it is written, and gives its memory to the part that follows.

    Otherwise gigabytes of the system's cache are filled for nobody, the base of the next merge goes from it, and the final
    sync waits for all of it. Where a system takes no such advice, nothing happens.
    """

    def __init__(self, size: int) -> None:
        self._on = HAS_FADVISE and size >= _LARGE
        self._lock = threading.Lock()
        self._fresh: list[tuple[int, int]] = []
        self._sent: list[tuple[int, int]] = []
        self._bytes = 0

    def wrote(self, file: io.FileIO, at: int, length: int) -> None:
        """So many bytes were written there."""
        if not self._on:
            return
        with self._lock:
            self._fresh.append((at, length))
            self._bytes += length
            if self._bytes < _WINDOW:
                return
            sent, self._sent, self._fresh, self._bytes = self._sent, self._fresh, [], 0
            fresh = self._sent
        with suppress(OSError):
            for span in (
                *fresh,
                *sent,
            ):  # the first time dirty pages are sent, the second time clean ones are dropped
                os.posix_fadvise(file.fileno(), *span, os.POSIX_FADV_DONTNEED)


class Pieces:
    """One tensor of a sink in the making: stretches of it in any order from any thread, then `close`."""

    def __init__(self, sink: TensorSink, info: TensorInfo) -> None:
        self._sink, self._info, self._left = sink, info, info.nbytes

    def put(self, tensor: torch.Tensor, first: int) -> None:
        """Write `tensor` as the elements from number `first` on, counted row by row; its dtype is taken on trust."""
        self.put_bytes(tensor_bytes(tensor), first * tensor.dtype.itemsize)

    def put_bytes(self, data: memoryview, at: int) -> None:
        """Write raw bytes, the first of them as the tensor's byte `at`."""
        self._sink._write(data, self._place(at, len(data)))
        self._count(len(data))

    def _place(self, at: int, length: int) -> int:
        """Where in the file bytes of this tensor lie."""
        if at < 0 or at + length > self._info.nbytes:
            raise RuntimeError(f"{length} bytes do not belong at byte {at} of {self._info.name!r}")
        return self._info.start + at

    def _count(self, length: int) -> None:
        with self._sink._state:
            self._left -= length

    def close(self) -> None:
        """All of it is written."""
        if self._left:
            raise RuntimeError(
                f"{self._left} bytes of {self._info.name!r} were not written, or some twice"
            )
        self._sink._written.add(self._info.name)


class TensorSink:
    """A safetensors file in the making: `specs` are final when it is opened, tensors come in any order from any thread.

    Everything goes into a hidden file beside `path`, which `commit` checks, syncs and renames; leaving the `with` block
    without `commit` removes it. So the output appears whole or not at all, and may even be one of the inputs (on
    Windows: close the source before `commit`). A symbolic link is replaced, not followed.

    Raises `WouldOverwrite`, or `CannotWrite` for a missing folder, no permission or a disk too full for the result.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Iterable[TensorSpec | TensorInfo],
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        header, self.infos = build_header(specs, metadata)
        self._header = len(header)
        self.size = max((info.stop for info in self.infos.values()), default=len(header))
        self._claimed: set[str] = set()
        self._written: set[str] = set()
        self._state = threading.Condition()
        self._writing = 0
        self._file: io.FileIO | None = None
        self._trail = _Trail(self.size)
        _check_target(self.path, self.size, overwrite)
        self._temporary = self.path.with_name(
            f".{self.path.name[:48]}.{os.getpid()}-{os.urandom(4).hex()}.part"
        )
        try:
            with self._os_errors():
                self._file = self._temporary.open("x+b", buffering=0)  # mode 0666 less the umask
                self._file.truncate(self.size)
            self._write(memoryview(header), 0)
        except BaseException:
            self.abort()
            raise

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; `ShapeMismatch` if its dtype or shape is not the promised one."""
        info = self._info(name)
        self._check(info, spec_of(name, tensor))
        self._claim(name)
        self._write(tensor_bytes(tensor), info.start)
        self._written.add(name)

    def pieces(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Pieces:
        """To write one tensor piece by piece; `ShapeMismatch` if its dtype or shape is not the promised one."""
        info = self._info(name)
        given = str(dtype).removeprefix("torch.")
        self._check(info, TensorSpec(name, _DTYPES.get(given, given), tuple(shape)))
        self._claim(name)
        return Pieces(self, info)

    def parts(self, name: str) -> Pieces:
        """To write one tensor's bytes piece by piece, their dtype and shape taken on trust."""
        self._claim(name)
        return Pieces(self, self._info(name))

    def copy_parts(self, items: Iterable[tuple[Pieces, Path, int, int, int]]) -> None:
        """Copy stretches of files: of each its start and length there, and the byte of the tensor where it goes."""
        runs: list[_Run] = []
        for pieces, path, start, length, at in items:
            runs.append(_Run(path, start, length, pieces._place(at, length), pieces._info.name))
            pieces._count(length)
        self._copy_runs(_coalesce(runs))

    def put_bytes(self, name: str, data: memoryview) -> None:
        """Write one tensor's raw bytes."""
        info = self._info(name)
        if len(data) != info.nbytes:
            raise ShapeMismatch(
                f"{len(data)} bytes given for a tensor of {info.nbytes}",
                file=self.path,
                tensor=name,
            )
        self._claim(name)
        self._write(data, info.start)
        self._written.add(name)

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor that was written."""
        info, done = self._info(name), 0
        buffer = memoryview(bytearray(info.nbytes))
        with self._open_file() as file:
            while done < info.nbytes:
                count = self._read_some(file, buffer[done:], info.start + done)
                if not count:
                    raise CorruptFile(
                        "the file was cut short while it was written", file=self.path, tensor=name
                    )
                done += count
        return buffer

    def restate(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by other values of the same length: hashes that are known once the tensors are written."""
        header, _ = build_header(self.infos.values(), metadata)
        if len(header) != self._header:
            raise RuntimeError("the header would change its length")
        self._write(memoryview(header), 0)

    def copy(self, name: str, source: TensorSource, source_name: str | None = None) -> None:
        """Copy one tensor's bytes unchanged; dtype and number of elements must agree with the spec."""
        self.copy_many([(name, source, name if source_name is None else source_name)])

    def copy_many(self, items: Iterable[tuple[str, TensorSource, str]]) -> None:
        """Copy `(name, source, source name)`; neighbours in both files go in one piece, at the speed of the disk."""
        runs: list[_Run] = []
        claimed: list[str] = []
        loose: list[
            tuple[str, TensorSource, str]
        ] = []  # strided or compressed: no raw bytes to copy
        for name, source, source_name in items:
            info, span, given = (
                self._info(name),
                source.span(source_name),
                source.infos[source_name],
            )
            if given.numel != info.numel or given.dtype != info.dtype:
                self._check(info, given)
            if span is None:
                loose.append((name, source, source_name))
            else:
                self._claim(name)
                claimed.append(name)
                runs.append(_Run(span[0], span[1], info.nbytes, info.start, name))
        self._copy_runs(_coalesce(runs))
        self._written.update(claimed)
        for name, source, source_name in loose:
            self.put(name, source.read(source_name).reshape(self.infos[name].shape))

    def commit(self, *, sync: bool = True) -> None:
        """Check that nothing is missing, sync, and let the file appear under its name.

        Without `sync` a power cut in the next seconds may leave a damaged file: for what can be made again at once.
        """
        missing = [name for name in self.infos if name not in self._written]
        try:
            if missing or self._file is None:
                what = (
                    f"{len(missing)} tensors were never written, {missing[:1]}"
                    if missing
                    else "the sink is closed"
                )
                raise RuntimeError(what)
            file = self._close()
            assert file is not None
            with self._os_errors(), file:
                if sync:
                    os.fsync(file.fileno())
            if not self.overwrite:
                _refuse_existing(self.path)
            with self._os_errors():
                self._temporary.replace(self.path)
        except BaseException:
            self.abort()
            raise
        if sync:
            _sync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove what was written; waits for writes under way. Does nothing after `commit`."""
        file = self._close()
        if file is not None:
            with suppress(OSError):
                file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    # inside

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.infos[name]
        except KeyError:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path) from None

    def _check(self, info: TensorInfo, given: TensorSpec | TensorInfo) -> None:
        if (given.dtype, given.shape) != (info.dtype, info.shape):
            promised, found = (
                f"{info.dtype} {list(info.shape)}",
                f"{given.dtype} {list(given.shape)}",
            )
            raise ShapeMismatch(
                f"{promised} was promised, {found} came", file=self.path, tensor=info.name
            )

    def _claim(self, name: str) -> None:
        with self._state:
            if name in self._claimed:
                raise RuntimeError(f"tensor {name!r} was written twice")
            self._claimed.add(name)

    @contextmanager
    def _open_file(self) -> Iterator[io.FileIO]:
        """The file, kept open while the block runs: a write into a closed and reused descriptor would hit another."""
        with self._state:
            if self._file is None:
                raise RuntimeError("the sink is closed")
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
        """Take the file away from the writers, when none is at work."""
        with self._state:
            self._state.wait_for(lambda: self._writing == 0)
            file, self._file = self._file, None
        return file

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _cannot_write(self.path, error, self.size) from error

    def _write(self, data: memoryview, at: int) -> None:
        with self._open_file() as file:
            self._write_to(file, data, at)

    def _write_to(self, file: io.FileIO, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            count = self._some(file, data[done : done + _CHUNK], at + done)
            self._trail.wrote(file, at + done, count)
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

    def _copy_runs(self, runs: Sequence[_Run]) -> None:
        """By two threads, where there is much to copy: one reads while the system lets the other write."""
        if len(runs) < 2 or sum(run.length for run in runs) < _MUCH:
            return self._copy_each(runs)
        failed: list[BaseException] = []

        def copy(part: Sequence[_Run]) -> None:
            try:
                self._copy_each(part)
            except BaseException as error:
                failed.append(error)
                self.abort()  # so that the other one stops too

        helper = threading.Thread(target=copy, args=(runs[1::2],), daemon=True)
        helper.start()
        copy(runs[::2])
        helper.join()
        if failed:
            raise failed[0]
        return None

    def _copy_each(self, runs: Sequence[_Run]) -> None:
        for path, group in _by_file(runs).items():
            self._copy_file(path, group)

    def _copy_file(self, path: Path, runs: Iterable[_Run]) -> None:
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

    def _copy_in_kernel(self, source: io.FileIO, run: _Run) -> int:
        """Bytes that the kernel copied without us, on some file systems without copying at all.

        That takes whole blocks. Elsewhere it copies page by page, for which we need half the time (ext4, Linux 6.18).
        """
        done = 0
        if (run.start - run.at) % _BLOCK:
            return done
        while HAS_COPY_FILE_RANGE and done < run.length:
            count = min(run.length - done, _WINDOW)
            with (
                self._open_file() as file
            ):  # anew each time, so that whoever gives the output up need not wait
                try:
                    copied = os.copy_file_range(
                        source.fileno(), file.fileno(), count, run.start + done, run.at + done
                    )
                except OSError as error:
                    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
                        raise
                    break  # another file system, an old kernel, a sandbox: the loop below tells real faults apart
                if copied == 0:
                    break
                self._trail.wrote(file, run.at + done, copied)
                done += copied
        return done

    def _copy_by_hand(self, source: io.FileIO, run: _Run, done: int, buffer: memoryview) -> None:
        while done < run.length:
            with self._open_file() as file:
                until = min(run.length, done + _WINDOW)
                while done < until:
                    try:
                        count = _read_at(source, buffer[: until - done], run.start + done)
                    except OSError as error:
                        raise unreadable(run.source, error).at(tensor=run.tensor) from error
                    if count == 0:
                        message = f"truncated: {run.length - done} bytes are missing at {run.start + done}"
                        raise CorruptFile(message, file=run.source, tensor=run.tensor)
                    self._write_to(file, buffer[:count], run.at + done)
                    done += count


def _read_at(file: io.FileIO, buffer: memoryview, at: int) -> int:
    if HAS_PREADV:
        return os.preadv(file.fileno(), [buffer], at)
    file.seek(at)
    return file.readinto(buffer) or 0


def _coalesce(runs: Iterable[_Run]) -> list[_Run]:
    """Join runs that follow each other in both files."""
    joined: list[_Run] = []
    for run in sorted(runs, key=lambda run: run.at):
        last = joined[-1] if joined else None
        if last and _follows(last, run):
            joined[-1] = last._replace(length=last.length + run.length)
        elif run.length:
            joined.append(run)
    return joined


def _follows(last: _Run, run: _Run) -> bool:
    places = last.start + last.length, last.at + last.length
    return last.source == run.source and places == (run.start, run.at)


def _by_file(runs: Iterable[_Run]) -> dict[Path, list[_Run]]:
    groups: dict[Path, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.source, []).append(run)
    return groups


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise WouldOverwrite(
            "the output exists", file=path, hint="use --overwrite, or another name with -o"
        )


def _check_target(path: Path, needed: int, overwrite: bool) -> None:
    """Everything about the output's place that can be known before a byte is written."""
    if "\0" in str(path):
        raise CannotWrite("a file name cannot hold a null character", file=repr(str(path)))
    try:
        if path.is_dir():
            raise CannotWrite("the output is a folder", file=path, hint="name a file in it")
        if not path.parent.is_dir():
            raise CannotWrite(
                f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
            )
        if path.exists() and not path.is_file():
            raise CannotWrite("the output is a device or pipe, no file", file=path)
        if not overwrite:
            _refuse_existing(path)
    except OSError as error:
        raise _cannot_write(path, error, needed) from error
    _check_space(path, needed)


def _check_space(path: Path, needed: int) -> None:
    import shutil

    try:
        usage = shutil.disk_usage(path.parent)
    except OSError:  # a file system that does not tell; the write itself will
        return
    if usage.total and usage.free < needed:
        message = f"the disk is too full: {needed} bytes are needed, {usage.free} are free"
        raise CannotWrite(message, file=path, hint="free space, or choose another disk with -o")


def _sync_folder(folder: Path) -> None:
    """Make the rename durable where a folder can be synced (not on Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def publish_folder(path: Path, known: Set[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which appears as `path` when the block ends well, and vanishes when it does not.

    An existing folder is replaced (`overwrite`) only if it holds nothing but files of the `known` names: at once on Linux
    and macOS, elsewhere by two renames, between which a killed process leaves only the hidden `.old` beside `path`.
    """
    check_folder(path, known, overwrite)
    token = f"{os.getpid()}-{os.urandom(4).hex()}"
    made, old = (path.with_name(f".{path.name[:48]}.{token}.{end}") for end in ("part", "old"))
    try:
        made.mkdir()
        yield made
        check_folder(path, known, overwrite)  # a long while later
        if not (
            path.exists() and exchange(made, path)
        ):  # after an exchange, `made` is the old folder
            if path.exists():
                path.rename(old)
            made.rename(path)
    except OSError as error:
        raise _cannot_write(path, error, 0) from error
    finally:
        _remove_folder(made)
        if old.exists() and not path.exists():
            old.rename(path)
        _remove_folder(old)
    _sync_folder(path.parent)


def _remove_folder(path: Path) -> None:
    """Remove what is there, if anything; of a link to a folder, the link."""
    import shutil

    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_folder(path: Path, known: Set[str], overwrite: bool) -> None:
    """Refuse an output folder that cannot be made, or whose replacement would destroy something else."""
    if not path.parent.is_dir():
        raise CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise WouldOverwrite(
            "this format is a folder, and a file of that name exists",
            file=path,
            hint="name another",
        )
    if not overwrite:
        _refuse_existing(path)
    strange = sorted(item.name for item in path.iterdir() if item.name not in known)
    if strange:
        raise WouldOverwrite(
            f"the folder holds other things, {strange[0]!r}: it is not replaced",
            file=path,
            hint="name another folder",
        )


class Spool:
    """Results whose specs are known only at the end: kept in memory up to `limit` bytes, then in a temporary file.

    `folder` is where that file goes; pass the output's folder, because the system's own may be memory (tmpfs). A
    context manager; leaving the block frees memory and file.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        import tempfile

        self.limit = limit
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self._file = tempfile.SpooledTemporaryFile(dir=str(self.folder))  # noqa: SIM115 closed by `close`
        self._places: dict[str, tuple[TensorSpec, int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor under a new name."""
        data = tensor_bytes(tensor)
        with self._lock, self._os_errors():
            if name in self._places:
                raise RuntimeError(f"tensor {name!r} was spooled twice")
            if self._end + len(data) > self.limit:
                self._file.rollover()  # before, not after, memory holds more than the limit
            self._file.seek(self._end)
            self._file.write(data)
            self._places[name] = spec_of(name, tensor), self._end, len(data)
            self._end += len(data)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def specs(self) -> list[TensorSpec]:
        """What was appended, in that order."""
        return [spec for spec, _, _ in self._places.values()]

    def read(self, name: str) -> memoryview:
        """The bytes kept under a name."""
        _, start, length = self._places[name]
        buffer = bytearray(length)
        with self._lock, self._os_errors():
            self._file.seek(start)
            done = self._file.readinto(buffer)
        if done != length:
            raise CorruptFile("the temporary file was cut short", file=self.folder, tensor=name)
        return memoryview(buffer)

    def write_to(self, sink: TensorSink) -> None:
        """Put everything into a sink that was opened with (at least) these specs."""
        for name in self._places:
            sink.put_bytes(name, self.read(name))

    def close(self) -> None:
        """Free memory and file."""
        self._file.close()

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _cannot_write(self.folder / "(temporary file)", error, self._end) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
