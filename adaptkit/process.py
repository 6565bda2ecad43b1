"""What is asked of the process: large blocks of memory, and threads of one torch thread each.

Several runs, and the program that they are part of, share the process: none leaves a trace in it.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.errors import NotEnoughMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HUGE",
    "cores",
    "explained",
    "free_memory",
    "free_on",
    "give_back",
    "huge",
    "one_thread_here",
    "out_of_memory",
    "release",
    "short_turns",
    "synchronize",
    "torch_threads",
]

HUGE = 1 << 22  # bytes: smaller blocks gain nothing
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
# bytes: larger blocks are of the system's own, and so much is kept of smaller ones that are free.
# With 3 MB an extraction took 3 % longer (medians of five runs in turns), for its scratch
_OWN, _KEPT = 3 << 20, 8 << 20
# seconds of sys.setswitchinterval: with Python's 5e-3 s, two workers took a tenth longer
_TURN = 1e-4


def huge(size: int) -> mmap.mmap | None:
    """Allocate at least `size` uninitialised bytes in huge pages, freed with the last reference.

    None for small blocks and unsupported systems. The system gets such a block back at once: with
    plain allocations an extraction took 24 MB more, at the same speed (three interleaved runs).
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    with suppress(OSError):  # a kernel without huge pages
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        return block
    return None


# MPS, and the allocators of a CPU on Linux, macOS and Windows, raise a plain RuntimeError
_REFUSALS = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")


class _Turns:
    """The switch interval as it was before the first of the runs that are going on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs = 0
        self.before = self.ours = 0.0


_turns = _Turns()
_counts = threading.Lock()  # between the two numbers, see `one_thread_here`


@contextmanager
def short_turns() -> Iterator[None]:
    """Shorten Python's thread switches; the last of several runs at once restores them."""
    with _turns.lock:
        if not _turns.runs:
            _turns.before = sys.getswitchinterval()
            sys.setswitchinterval(min(_turns.before, _TURN))
            _turns.ours = sys.getswitchinterval()
        _turns.runs += 1
    try:
        yield
    finally:
        with _turns.lock:
            _turns.runs -= 1
            # unless the program has set another meanwhile
            if not _turns.runs and sys.getswitchinterval() == _turns.ours:
                sys.setswitchinterval(_turns.before)


def torch_threads() -> int:
    """The number of threads that torch computes with in the calling thread."""
    import torch

    with _counts:
        return torch.get_num_threads()


def one_thread_here() -> None:
    """Let torch compute with one thread in the calling thread alone.

    `torch.set_num_threads` sets two numbers: the calling thread's own, and that of every thread
    which asks for the first time afterwards. The second is set back at once, by a thread whose own
    number is of no account.
    """
    import torch

    asked, done = threading.Event(), threading.Event()
    whole: list[int] = []

    def elsewhere() -> None:
        whole.append(torch.get_num_threads())
        asked.set()
        done.wait()
        torch.set_num_threads(whole[0])

    with _counts:
        other = threading.Thread(target=elsewhere, name="adaptkit-count", daemon=True)
        other.start()
        asked.wait()
        torch.get_num_threads()  # or the first use would take the number of the whole process
        try:
            torch.set_num_threads(1)
        finally:
            done.set()
            other.join()


def give_back() -> None:
    """Let the C library return large blocks to the system as soon as they are freed.

    For programs that own their process. glibc would keep blocks of up to 32 MB for later, in every
    thread: an extraction of a layer of 2560 × 5120 as a LoKr took 147 MB instead of the 113 that
    its plan tells.
    """
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # other libraries have no such setting
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _OWN)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def out_of_memory(error: BaseException) -> bool:
    """Whether the system or a device refuses memory, in the words of torch, NumPy or Python."""
    # torch's own error is a RuntimeError that says so: torch need not be imported to tell
    text = str(error).lower()
    told = isinstance(error, RuntimeError) and any(words in text for words in _REFUSALS)
    return told or isinstance(error, MemoryError)


def explained(error: BaseException) -> BaseException:
    """The error to raise instead: memory that the system refuses is no bug."""
    if not out_of_memory(error):
        return error
    what = str(error).partition("\n")[0]
    told = NotEnoughMemory(
        "this machine has no memory left" + (f": {what}" if what else ""),
        hint="give --memory less, or end other programs",
    )
    told.__cause__ = error
    return told


def release(device: str) -> None:
    """Give back the memory that torch keeps for a device."""
    import torch

    empty = getattr(getattr(torch, device.partition(":")[0], None), "empty_cache", None)
    if empty is not None:
        empty()


def free_on(device: str) -> int | None:
    """The free bytes of a device's memory; None if it does not tell."""
    import torch

    ask = getattr(getattr(torch, device.partition(":")[0], None), "mem_get_info", None)
    return None if ask is None else int(ask(device)[0])


def cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return max(1, len(allowed(0)) if allowed is not None else os.cpu_count() or 1)


def free_memory() -> int | None:
    """Bytes that programs may still take, within the limit of a container; None if not told."""
    if sys.platform == "win32":
        return _free_of_windows()
    found = [_free_of_linux(), _left_in_group()]
    if found[0] is None:  # macOS tells what there is: half of it may be in use
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min((size for size in found if size is not None), default=None)


def _free_of_linux() -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return None


def _left_in_group() -> int | None:
    """What the limit of a control group leaves; None without a limit."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # ValueError: "max"
        whole = int((group / "memory.max").read_text(encoding="ascii"))
        return max(0, whole - int((group / "memory.current").read_text(encoding="ascii")))
    return None


def _free_of_windows() -> int | None:
    import ctypes

    # MEMORYSTATUSEX: its own length, the load, total and available bytes, and five more
    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)
    with suppress(OSError, AttributeError):
        ask = getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx  # noqa: B009
        if ask(ctypes.byref(status)):
            return int(status[2])
    return None


def synchronize(device: str) -> None:
    """Wait until a device has done what the calling thread has asked of it."""
    import torch

    wait = getattr(getattr(torch, device.partition(":")[0], None), "synchronize", None)
    if wait is not None:
        wait()
