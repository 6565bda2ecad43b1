"""Two paths exchanged in one step, where the system can: a folder replaced by another is at no moment missing."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD = -100  # Linux: relative paths count from the working folder
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux' renameat2(2), RENAME_SWAP of macOS' renamex_np(2)


def exchange(one: Path, two: Path) -> bool:
    """Exchange two existing paths on one disk; False, and nothing done, where this system or disk cannot."""
    call = _system_call()
    return call is not None and call(os.fsencode(one), os.fsencode(two)) == 0


@cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    """0 for success; every other outcome leaves both paths as they were."""
    system = platform.system()  # not sys.platform, of which a type checker reads one branch
    try:
        library = ctypes.CDLL(None)
        if system == "Linux":
            rename = library.renameat2
            rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
            return lambda one, two: int(rename(_AT_FDCWD, one, _AT_FDCWD, two, _EXCHANGE))
        if system == "Darwin":
            swap = library.renamex_np
            swap.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
            return lambda one, two: int(swap(one, two, _EXCHANGE))
    except (OSError, AttributeError, TypeError):  # no such library, an older one, Windows
        pass
    return None
