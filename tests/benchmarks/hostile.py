"""`inspect` on hostile files: the worst time and memory, one verdict each, and nothing of them run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import PYTHON, ROOT, Measured, child

SECONDS, BYTES, SMALL = 1.0, 200_000_000, 1_000_000
WORST = 8  # files that the table shows


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed: files below 1 MB that take too long, and unclear verdicts."""
    made = child(PYTHON, "-m", "tests.fuzz.hostile", folder / "hostile").output.split()
    paths = [Path(path) for path in made][:: 8 if small else 1]
    found = {path: inspected(path) for path in paths}
    # what a file costs is the least of three sweeps: others on the machine only add to it
    for _ in range(0 if small else 2):
        for path in (path for path, one in found.items() if (one.cpu or 0.0) > SECONDS / 2):
            found[path] = min(found[path], inspected(path), key=lambda one: one.cpu or 0.0)
    held = [path for path in paths if _size(path) <= SMALL]
    missed = [f"{path.name}: {what}" for path in paths if (what := unclear(found[path]))]
    missed += [f"{path.name} takes {what}" for path in held if (what := excess(found[path]))]
    table = Table(
        title=f"inspect: {len(paths)} hostile files, whole processes, the least of three, the {WORST} worst"
    )
    for name in ("file", "kB", "CPU seconds", "peak MB"):
        table.add_column(name, justify="left" if name == "file" else "right")
    for path in sorted(paths, key=lambda path: -(found[path].cpu or 0.0))[:WORST]:
        one = found[path]
        size = f"{_size(path) / 1000:.0f}"
        table.add_row(path.name, size, measure.seconds(one.cpu), measure.megabytes(one.peak))
    console.print(table)
    slowest = max((found[path].cpu or 0.0) for path in held)
    largest = max((found[path].peak or 0) for path in held)
    console.print(
        f"below 1 MB: {len(held)} files, at most {slowest:.2f} s (goal {SECONDS:.0f}) and "
        f"{largest / 1e6:.0f} MB (goal {BYTES / 1e6:.0f})"
    )
    if (ROOT / "PWNED").exists():
        missed.append("a file ran its code")
    return missed


def inspected(path: Path) -> Measured:
    return child(PYTHON, "-m", "adaptkit", "inspect", path, codes=(0, 1))


def unclear(one: Measured) -> str | None:
    """Why the end of a run is no clear verdict."""
    if "Traceback" in one.output or "unexpected" in one.output:
        return "an unforeseen error"
    errors = [line for line in one.output.splitlines() if line.startswith("error:")]
    return None if len(errors) < 2 else f"{len(errors)} errors for one file"


def excess(one: Measured) -> str | None:
    """What a small file takes beyond the goal; CPU time, as others use the machine."""
    if one.cpu is not None and one.cpu > SECONDS:
        return f"{one.cpu:.2f} s"
    return f"{one.peak / 1e6:.0f} MB" if one.peak is not None and one.peak > BYTES else None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in files)
