"""Atomic exchange of two paths, on systems that offer it."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS: sys/stdio.h


def exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths atomically; False if nothing happened.

    The reason for a failure is ignored (no such call, unsupported file system, sandbox, no
    permission). The caller falls back to plain renames, which succeed or report the error.
    """
    try:
        call = _call()
        return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0
    except (OSError, ValueError):  # no C library to load; a null character in a path
        return False


@cache
def _call() -> Callable[[bytes, bytes], int] | None:
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
        return lambda one, other: int(found(one, other, _RENAME_SWAP))
    found.argtypes = (ctypes.c_int, path, ctypes.c_int, path, flags)
    return lambda one, other: int(found(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE))
