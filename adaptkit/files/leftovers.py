"""What dead runs left: hidden files and folders under which outputs are written.

A name is `.OUTPUT.PID-MARK.part`. The mark names the machine and the file. A run removes the
leftovers of dead ones under its own output's name; `adaptkit clean` removes all of a folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Leftover", "forget", "found", "hidden", "lock", "remove", "remove_dead"]

_SHOWN = 48  # characters of the output's name
_NAME = re.compile(
    r"\.(?P<output>.+)\.(?P<pid>\d+)-(?P<machine>[0-9a-f]{4})[0-9a-f]{8}(\.\w+)?\.(?P<end>part|old)"
)
# of this process: its id may be that of a dead run
_MINE: set[str] = set()


@cache
def _machine() -> str:
    """A mark of this machine: process ids say nothing about those of another."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def hidden(path: Path, end: str = "part") -> Path:
    """A new hidden name beside an output, under which it is written."""
    token = f"{os.getpid()}-{_machine()}{os.urandom(4).hex()}"
    made = path.with_name(f".{path.name[:_SHOWN]}.{token}.{end}")
    _MINE.add(str(made))
    return made


def forget(path: Path) -> None:
    """Note that this process no longer writes under a hidden name."""
    _MINE.discard(str(path))


class Leftover(NamedTuple):
    """A hidden file or folder of a run, and whether that run is dead."""

    path: Path
    dead: bool
    bytes: int


def found(folder: Path) -> Iterator[Leftover]:
    """Every leftover directly in a folder."""
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is not None and _is_spare(path, folder / match["output"]):
            yield Leftover(path, _is_dead(path, match), _size(path))


def remove_dead(output: Path) -> None:
    """Remove what dead runs left under the name of this output; never what a live one writes."""
    shown = output.name[:_SHOWN]
    with suppress(OSError):
        for entry in os.scandir(output.parent):
            # a hidden name may itself be written under a hidden name
            if entry.name.lstrip(".").startswith(f"{shown}."):
                match = _NAME.fullmatch(entry.name)
                path = output.parent / entry.name
                if match is not None and _is_spare(path, output) and _is_dead(path, match):
                    remove(path)


def remove(path: Path) -> bool:
    """Remove a file or folder; returns whether it is gone."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return not os.path.lexists(path)


def _is_spare(path: Path, output: Path) -> bool:
    """Whether nothing is lost with it: an old folder is all there is until the new one is."""
    return path.suffix == ".part" or output.exists()


def _is_dead(path: Path, match: re.Match[str]) -> bool:
    if match["machine"] != _machine() or str(path) in _MINE:
        return False
    pid = int(match["pid"])
    return (pid == os.getpid() or not _is_running(pid)) and not _is_locked(path)


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":
        return _runs_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _runs_on_windows(pid: int) -> bool:
    """There a signal of 0 would be ^C."""
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return bool(kernel.GetLastError() == 5)  # access denied: it is someone's
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE


def lock(file: io.FileIO) -> None:
    """Mark a file as in use, for processes that cannot see this one; no-op on Windows."""
    with suppress(OSError, ImportError):
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: Path) -> bool:
    """Whether a process holds this file, or a file in this folder."""
    try:
        import fcntl
    except ImportError:  # Windows refuses to remove a file that is open
        return False
    files = [item for item in path.rglob("*") if item.is_file()] if path.is_dir() else [path]
    for item in files:
        try:
            with item.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
    return False


def _size(path: Path) -> int:
    with suppress(OSError):
        if path.is_dir():
            return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
        return path.stat().st_size
    return 0
