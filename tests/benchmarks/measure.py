"""Child processes with their wall time, CPU time and peak memory.

This module, and everything the parent process of the benchmarks imports, stays free of torch and NumPy. Linux carries the
peak memory of the process that forked over into the figure of the program it starts, so a parent of 600 MB would make
every child look like 600 MB; ours is about 40 MB, which is the floor of what can be measured (the figures of `cp`).

Peak memory comes from wait4(2): `ru_maxrss`, in KiB on Linux, in bytes on macOS. Windows has no wait4; there the figure is
None, shown as a dash, and no memory limit is checked.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = sys.executable
TORCH = "import torch; print(torch.__version__, torch.get_num_threads(), torch.cuda.is_available())"


@dataclass(frozen=True)
class Measured:
    seconds: float
    cpu: (
        float | None
    )  # user and system time of the child: less disturbed by other work on the machine
    peak: int | None  # bytes
    output: str

    def json(self) -> Any:
        """The output, from its first brace or bracket on: warnings may stand before it."""
        start = min(found for found in (self.output.find("{"), self.output.find("[")) if found >= 0)
        return json.loads(self.output[start:])


class ChildFailed(Exception):
    pass


def child(*command: str | Path, codes: Sequence[int] = (0,)) -> Measured:
    """Run a program to its end; ChildFailed, with its output, unless it ends with one of these codes."""
    arguments = [str(part) for part in command]
    # an installed package is compiled once, by pip: what is measured must not compile its sources at every start
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
        cpu, peak = _wait(process)
        seconds = time.perf_counter() - started
        out.seek(0)
        output = out.read().decode("utf-8", "replace")
    if process.returncode not in codes:
        raise ChildFailed(f"{' '.join(arguments)}: exit status {process.returncode}\n{output}")
    return Measured(seconds, cpu, peak, output)


def _wait(process: subprocess.Popen[bytes]) -> tuple[float | None, int | None]:
    if not hasattr(os, "wait4"):
        process.wait()
        return None, None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(
        status
    )  # so that Popen does not wait for it again
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def module(name: str, *arguments: str | Path) -> Measured:
    """A module of ours as a child."""
    return child(PYTHON, "-m", f"tests.benchmarks.{name}", *arguments)


def adaptkit(*arguments: str | Path) -> Measured:
    return child(PYTHON, "-m", "adaptkit", *arguments)


@functools.cache
def torch_start() -> Measured:
    """One start of Python that imports torch, kept for all benchmarks of a run."""
    return child(PYTHON, "-c", TORCH)


def settle() -> None:
    """Let the disk finish what earlier steps wrote, so that it is not charged to the next one."""
    if hasattr(os, "sync"):
        os.sync()


def facts() -> str:
    version, threads, cuda = torch_start().output.split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{platform.platform()}, {platform.machine()}, {_processor()}, {cores} cores{_memory()}\n"
        f"Python {platform.python_version()}, torch {version}, {threads} threads, CUDA: {'yes' if cuda == 'True' else 'no'}"
    )


def machine() -> str:
    """The processor and the version of torch, in one line."""
    version, _, _ = torch_start().output.split()
    return f"{_processor()}, {os.cpu_count()} cores{_memory()}, torch {version}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (AttributeError, ValueError, OSError):
        return ""


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


def ratio(value: float, to: float | None) -> str:
    return "–" if not to else f"{value / to:.2f}" if value < 10 * to else f"{value / to:.0f}"


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
