"""A layer between adaptkit and the disk, with one fault in it, and the semantics of two systems.

Every byte that adaptkit reads or writes, every rename, sync and close passes here. POSIX has
positioned reads and writes, atomic renames and folders that can be synced. Windows has none of
these, refuses to rename or to remove a file that is open, and no rename there replaces a folder.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptkit.files import _exchange, leftovers, output_file, publish, reader

SYSTEMS = ("posix", "windows")


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Disk:
    """What happens on a disk: override a method for a fault. Paths are below `root`."""

    def __init__(self, root: Path, system: str) -> None:
        self.root, self.windows = root, system == "windows"
        self.lock = threading.Lock()
        self.files: dict[int, File] = {}
        self.seen: list[str] = []  # the calls that a fault could have met

    # faults ---------------------------------------------------------------------------------

    def opening(self, path: Path, writing: bool) -> None:
        """Before a file is opened."""

    def reading(self, path: Path, length: int) -> int:
        """How many bytes a read may give."""
        return length

    def writing(self, path: Path, length: int) -> int:
        """How many bytes a write may take."""
        return length

    def sizing(self, path: Path, size: int) -> None:
        """Before a file gets its size."""

    def syncing(self, path: Path) -> None:
        """Before a file or a folder is synced."""

    def closing(self, path: Path, writing: bool) -> None:
        """When a file is closed; the descriptor is freed all the same."""

    def renaming(self, source: Path, target: Path) -> None:
        """Before a rename, an exchange or a link."""

    def removing(self, path: Path) -> None:
        """Before a file is removed."""

    # calls ------------------------------------------------------------------------------------

    def told(self, what: str) -> None:
        with self.lock:
            self.seen.append(what)

    def inside(self, path: object) -> bool:
        return str(path).startswith(str(self.root))

    def held(self, path: Path) -> None:
        """Windows: a file that is open keeps its name."""
        if self.windows:
            with self.lock:
                names = [file.path for file in self.files.values() if not file.closed]
            if any(one == path or path in one.parents for one in names):
                raise PermissionError(
                    errno.EACCES, "the file is in use by another process", str(path)
                )

    def install(self, patch: pytest.MonkeyPatch) -> None:
        self._files(patch)
        self._names(patch)
        patch.setattr(output_file, "HAS_COPY_FILE_RANGE", False)
        if not self.windows:
            self._positioned(patch)
            return
        for module, name in (
            (output_file, "HAS_PWRITE"), (output_file, "HAS_PREADV"), (output_file, "HAS_FADVISE"),
            (reader, "HAS_PREADV"), (reader, "HAS_FADVISE"),
        ):  # fmt: skip
            patch.setattr(module, name, False)
        patch.setattr(shutil, "_use_fd_functions", False)
        patch.setattr(_exchange, "sys", SimpleNamespace(platform="win32"))
        patch.setattr(leftovers, "lock", lambda _: None)
        patch.setattr(output_file, "lock", lambda _: None)
        patch.setattr(leftovers, "_is_locked", lambda _: False)

    def _files(self, patch: pytest.MonkeyPatch) -> None:
        plain = Path.open

        def opened(
            path: Path, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any
        ) -> Any:
            if not self.inside(path):
                return plain(path, mode, buffering, *rest, **more)
            raw = File(self, path, mode.replace("b", ""))
            if buffering == 0:
                return raw
            kind = {"r": io.BufferedReader, "w": io.BufferedWriter}.get(mode[0], io.BufferedRandom)
            held = kind(raw)  # type: ignore[type-var]
            return held if "b" in mode else io.TextIOWrapper(held, *rest, **more)

        patch.setattr(Path, "open", opened)

    def _positioned(self, patch: pytest.MonkeyPatch) -> None:
        pwrite, preadv = os.pwrite, os.preadv

        def write(fd: int, data: Any, at: int) -> int:
            view = memoryview(data)
            if (file := self.files.get(fd)) is None:
                return pwrite(fd, view, at)
            self.told("write")
            return pwrite(fd, view[: self.writing(file.path, len(view))], at)

        def read(fd: int, buffers: Any, at: int) -> int:
            if (file := self.files.get(fd)) is None:
                return preadv(fd, buffers, at)
            self.told("read")
            (view,) = map(memoryview, buffers)
            return preadv(fd, [view[: self.reading(file.path, len(view))]], at)

        patch.setattr(os, "pwrite", write)
        patch.setattr(os, "preadv", read)

    def _names(self, patch: pytest.MonkeyPatch) -> None:
        plain = {
            name: getattr(os, name) for name in ("replace", "rename", "unlink", "fsync", "link")
        }
        fd_open = os.open

        def replace(source: Any, target: Any) -> None:
            self.rename("replace", source, target)
            plain["replace"](source, target)

        def rename(source: Any, target: Any) -> None:
            self.rename("rename", source, target)
            if self.windows and os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "the file exists", str(target))
            plain["rename"](source, target)

        def link(source: Any, target: Any) -> None:
            self.rename("link", source, target)
            plain["link"](source, target)

        def unlink(path: Any, **more: Any) -> None:
            if self.inside(path):
                self.told("remove")
                self.removing(Path(path))
                self.held(Path(path))
            plain["unlink"](path, **more)

        def fsync(fd: int) -> None:
            file = self.files.get(fd)
            self.told("sync")
            self.syncing(self.root if file is None else file.path)
            plain["fsync"](fd)

        def call(source: bytes, target: bytes, flag: int) -> int:
            """renameat2."""
            one, other = Path(os.fsdecode(source)), Path(os.fsdecode(target))
            try:
                self.rename("renameat2", one, other)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            return real(source, target, flag)

        def open_folder(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if self.windows and self.inside(path) and Path(path).is_dir():
                raise PermissionError(errno.EACCES, "a folder", str(path))
            return fd_open(path, flags, *rest, **more)

        for name, made in (
            ("replace", replace), ("rename", rename), ("link", link), ("unlink", unlink),
            ("fsync", fsync),
        ):  # fmt: skip
            patch.setattr(os, name, made)
        patch.setattr(publish.os, "open", open_folder)
        if self.windows:
            patch.setattr(_exchange, "_call", lambda: None)
        elif (real := _exchange._call()) is not None:
            patch.setattr(_exchange, "_call", lambda: call)

    def rename(self, call: str, source: Any, target: Any) -> None:
        if self.inside(target):
            self.told(call)
            self.renaming(Path(source), Path(target))
            self.held(Path(source))
            self.held(Path(target))


class File(io.FileIO):
    """A file of the layer."""

    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        self.disk, self.path, self.output = disk, Path(path), mode != "r"
        disk.told("open")
        disk.opening(self.path, self.output)
        super().__init__(path, mode)
        disk.files[self.fileno()] = self

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self.disk.told("read")
        return super().readinto(view[: self.disk.reading(self.path, len(view))]) or 0

    def readall(self) -> bytes:
        parts = []
        while part := self.read(1 << 20):
            parts.append(part)
        return b"".join(parts)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.disk.told("write")
        return super().write(view[: self.disk.writing(self.path, len(view))]) or 0

    def truncate(self, size: int | None = None) -> int:
        self.disk.told("size")
        self.disk.sizing(self.path, size or 0)
        return super().truncate(size)

    def close(self) -> None:
        if self.closed:
            return
        self.disk.files.pop(self.fileno(), None)
        super().close()
        self.disk.told("close")
        self.disk.closing(self.path, self.output)


Fault = Callable[[Disk], None]
