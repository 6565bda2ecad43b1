"""Atomic exchange of two paths, on systems that offer it."""

from __future__ import annotations

import errno
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["exchange", "rename_new"]

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS: sys/stdio.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCL = 4  # macOS


def exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths atomically; False if nothing happened.

    The reason for a failure is ignored (no such call, unsupported file system, sandbox, no
    permission). The caller falls back to plain renames, which succeed or report the error.
    """
    try:
        call = _call()
        swap = _RENAME_EXCHANGE if sys.platform == "linux" else _RENAME_SWAP
        return call is not None and call(os.fsencode(one), os.fsencode(other), swap) == 0
    except (OSError, ValueError):  # no C library to load; a null character in a path
        return False


def rename_new(source: Path, target: Path) -> None:
    """Give a path its final name, atomically; FileExistsError if another has that name.

    Where the system has no such call, a hard link is one; without links (some network and USB
    file systems), the name is checked just before.
    """
    new = _RENAME_NOREPLACE if sys.platform == "linux" else _RENAME_EXCL
    if (call := _call()) is not None:
        import ctypes

        ctypes.set_errno(0)
        if call(os.fsencode(source), os.fsencode(target), new) == 0:
            return
        if ctypes.get_errno() == errno.EEXIST:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if sys.platform == "win32":
        source.rename(target)  # refuses an existing name
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a folder, or a file system without links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)
    else:
        source.unlink()


@cache
def _call() -> Callable[[bytes, bytes, int], int] | None:
    """renameat2(2) on Linux (glibc >= 2.28), renamex_np(2) on macOS; None elsewhere."""
    if sys.platform not in ("linux", "darwin"):
        return None
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renamex_np"
    found: Any = getattr(library, name, None)
    if found is None:
        return None
    path, flags = ctypes.c_char_p, ctypes.c_uint
    found.restype = ctypes.c_int
    if name == "renamex_np":
        found.argtypes = (path, path, flags)
        return lambda one, other, flag: int(found(one, other, flag))
    found.argtypes = (ctypes.c_int, path, ctypes.c_int, path, flags)
    return lambda one, other, flag: int(found(_AT_FDCWD, one, _AT_FDCWD, other, flag))
