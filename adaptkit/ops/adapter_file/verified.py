"""Compare the error measured on a finished file with the one that is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import CorruptFile

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["agreed"]

CLOSE = 1e-3  # of the error: both are measured in float64, on other orders of the same sums
ROUNDING = 1e-6  # of ‖ΔW‖: a copy decoded in float32


def agreed(measured: float, reported: float, output: Path) -> float:
    """The measured relative error; CorruptFile if it is not what is reported."""
    if abs(measured - reported) <= CLOSE * reported + ROUNDING:
        return measured
    raise CorruptFile(
        f"verification failed: read back, its relative error is {measured:.6g}, not {reported:.6g}",
        hint="the file was not written; run again, and report it if it stays",
        file=output,
    )
