"""`peer`: extraction from full-size SD 1.5 checkpoints against the ten lines that a capable user writes, turn by turn.

Those stream both files through `torch.svd_lowrank(q = rank + 8, niter = 2)`: see `obvious.stream`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import Measured, median, megabytes, module, ratio, seconds

RUNS = 3  # of each in turns, of which the median counts
RANK = 32


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed: an error larger than that of the script."""
    base, tuned, ours, theirs = (
        folder / f"{name}.safetensors" for name in ("base", "tuned", "ours", "theirs")
    )
    module("pair", folder, *(["--small"] if small else []))
    rank = 4 if small else RANK
    jobs = {
        "script": lambda: module("obvious", "stream", base, tuned, theirs, "--rank", str(rank)),
        "adaptkit": lambda: measure.adaptkit(
            "extract", base, tuned, "--rank", str(rank), "-o", ours, "--overwrite", "--json"
        ),
    }
    found: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(1 if small else RUNS):
        for name, job in jobs.items():
            measure.settle()
            found[name].append(job())
    errors = {
        "script": module("obvious", "lost", base, tuned, theirs).json()["error"],
        "adaptkit": _error(found["adaptkit"][-1].json()["details"]),
    }
    for path in (base, tuned, ours, theirs):
        path.unlink()
    table = Table(
        title=f"LoRA of rank {rank} from a pair: median of {len(found['script'])} runs in turns"
    )
    for column in ("what", "seconds", "CPU s", "peak MB", "error", "of the script"):
        table.add_column(column, justify="left" if column == "what" else "right")
    first = median([one.seconds for one in found["script"]])
    for name, runs in found.items():
        took = median([one.seconds for one in runs])
        cpu = median([one.cpu for one in runs if one.cpu is not None] or [0.0])
        peak = max((one.peak for one in runs if one.peak is not None), default=None)
        title = "torch.svd_lowrank, streamed" if name == "script" else "adaptkit extract"
        table.add_row(
            title,
            seconds(took),
            seconds(cpu),
            megabytes(peak),
            f"{errors[name]:.5f}",
            ratio(took, first),
        )
    console.print(table)
    worse = errors["adaptkit"] > errors["script"]
    return [
        f"peer: an error of {errors['adaptkit']:.5f}, {errors['script']:.5f} of the script"
    ] * worse


def _error(details: list[dict[str, float]]) -> float:
    """Over the layers of the adapter, as `obvious.lost` has it."""
    norm = sum(one["norm"] ** 2 for one in details)
    return (sum((one["relative_error"] * one["norm"]) ** 2 for one in details) / norm) ** 0.5
