"""Large blocks of memory from the operating system, in huge pages where it has them."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress

__all__ = ["HUGE", "forget", "huge"]

HUGE = 1 << 22  # bytes from which it is worth while
_LOOSE = 2  # a block serves needs down to this part of its size


class _Own(threading.local):
    """The blocks that a thread asked for and may get again."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []


_own = _Own()


def huge(size: int) -> memoryview | None:
    """At least `size` writable bytes in huge pages, of any content; None for few, and on systems without.

    Freed with its last use. A page fault for each 4 KB of fresh memory took a quarter of the CPU time of an extraction, in
    a virtual machine, and to have fresh pages cleared a fifteenth: so a thread gets a block of its own again that is free
    and of about that size, as in layers of one shape. Free blocks of other sizes go back before a new one comes.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    views = _own.views
    fits = [
        n for n in range(len(views)) if size <= len(views[n]) <= _LOOSE * size and _free(views, n)
    ]
    if fits:
        return views[min(fits, key=lambda n: len(views[n]))]
    views[:] = [views[n] for n in range(len(views)) if not _free(views, n)]
    with suppress(OSError):  # a kernel built without them
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        views.append(memoryview(block))
        return views[-1]
    return None


def _free(views: list[memoryview], n: int) -> bool:
    """Whether nothing refers to a view but the list, and the call that counts."""
    return sys.getrefcount(views[n]) <= 2


def forget() -> None:
    """Give back what this thread would get again: for one that is about to wait."""
    _own.views.clear()
