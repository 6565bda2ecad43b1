"""`linalg`: the kernels against LAPACK, in a child process."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import module, ratio


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed (nothing: the tests hold the kernels to their bounds)."""
    found = module("kernels", *(["--small"] if small else []))
    table = Table(title="linalg: rank 32, factor 8, against torch.linalg.svd in float32")
    for name in ("what", "ms", "LAPACK ms", "of LAPACK", "error above the optimum"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in found.json():
        ours, theirs = row["ours"], row["theirs"]
        table.add_row(
            row["what"],
            f"{1e3 * ours:.1f}",
            f"{1e3 * theirs:.1f}",
            ratio(ours, theirs),
            f"{100 * row['excess']:.4f} %",
        )
    console.print(table)
    return []
