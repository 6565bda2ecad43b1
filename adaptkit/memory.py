"""Large blocks of memory from the operating system, in huge pages where it has them, and used again."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any

__all__ = ["HUGE", "IDLE", "huge"]

HUGE = 1 << 22  # bytes from which it is worth while
IDLE = 96 << 20  # bytes kept for the next that asks
SLACK = 1.5  # a block may be so much larger than what is asked for


class _Idle:
    """Blocks that nobody uses at the moment, the latest last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a block may come back while another is looked for, in the same thread
        self._blocks: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap | None:
        """One of at least `size` bytes, and not much more."""
        with self._lock:
            fitting = [block for block in self._blocks if size <= len(block) <= SLACK * size]
            if not fitting:
                return None
            best = min(fitting, key=len)
            self._blocks = [block for block in self._blocks if block is not best]
            return best

    def give(self, block: mmap.mmap) -> None:
        """Keep it, and let the oldest go."""
        with self._lock:
            self._blocks.append(block)
            while sum(map(len, self._blocks)) > IDLE:
                self._blocks.pop(0)

    def bytes(self) -> int:
        """Of all of them."""
        with self._lock:
            return sum(map(len, self._blocks))


_idle = _Idle()


def huge(size: int) -> Any:
    """A buffer of `size` bytes of anything, in huge pages; None for small ones, and on systems without.

    A page fault for each 4 KB of fresh memory took a quarter of the CPU time of an extraction, in a virtual machine, and
    clearing huge pages still a tenth: so a block that is no longer used waits for the next of about its size.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    block = _idle.take(size)
    if block is None:
        with suppress(OSError):  # a kernel built without them
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_HUGEPAGE)
    if block is None:
        return None
    view = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(view, _idle.give, block).atexit = False
    return view
