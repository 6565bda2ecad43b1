"""Large blocks of memory from the operating system, in huge pages where it has them."""

from __future__ import annotations

import mmap
from contextlib import suppress

__all__ = ["HUGE", "huge"]

HUGE = 1 << 22  # bytes from which it is worth while


def huge(size: int) -> mmap.mmap | None:
    """A block of zeros in huge pages; None for small ones, and on systems without.

    A page fault for each 4 KB of fresh memory took a quarter of the CPU time of an extraction, in a virtual machine.
    """
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_HUGEPAGE)
            return block
    return None
