"""Allocate large blocks of memory in huge pages, on systems that have them."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress

__all__ = ["HUGE", "forget", "huge"]

HUGE = 1 << 22  # bytes: smaller blocks gain nothing
_LOOSE = 2  # a block is reused for requests of at least 1/_LOOSE of its size


class _Own(threading.local):
    """A thread's own blocks, kept for reuse."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []


_own = _Own()


def huge(size: int) -> memoryview | None:
    """Allocate at least `size` uninitialised bytes in huge pages, or None.

    None for small blocks and unsupported systems.

    The block is freed with its last reference. Page faults of 4 KB pages took a quarter of the CPU
    time of an extraction in a virtual machine, and clearing fresh pages a fifteenth. A thread
    therefore reuses its own free blocks of about the right size, as for layers of one shape, and
    releases its other free blocks before it allocates a new one.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    views = _own.views
    fits = [
        n for n in range(len(views)) if size <= len(views[n]) <= _LOOSE * size and _free(views, n)
    ]
    if fits:
        return views[min(fits, key=lambda n: len(views[n]))]
    # a block in use elsewhere stays listed: it may become free later
    views[:] = [views[n] for n in range(len(views)) if not _free(views, n)]
    with suppress(OSError):  # a kernel without huge pages
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        views.append(memoryview(block))
        return views[-1]
    return None


def _free(views: list[memoryview], n: int) -> bool:
    """Whether only the list and this call refer to a block."""
    # one reference from the list, one from getrefcount's own argument
    return sys.getrefcount(views[n]) <= 2


def forget() -> None:
    """Release this thread's free blocks, before a long wait."""
    _own.views.clear()
