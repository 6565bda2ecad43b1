"""`inspect`: a 2,000-key file against the start of torch, which it must not import."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import PYTHON, child, median, ratio, seconds
from tests.synth import FIXTURES, Listing, load_listing, write_header_only

KEYS = 2000
LIMIT = 0.25  # of the time of `python -c 'import torch'`
LOADED = (
    "import sys; from adaptkit.cli import main\n"
    "try: main()\n"
    "except SystemExit as stop: assert not stop.code, stop.code\n"
    "print('torch' in sys.modules)"
)


def write_kohya(path: Path, keys: int = KEYS) -> Path:
    """A LoRA file of exactly so many keys: SDXL in kohya's names, cut."""
    listing: Listing = load_listing(FIXTURES / "keys" / "sdxl-kohya.tsv")
    assert len(listing) >= keys
    return write_header_only(
        path, dict(list(listing.items())[:keys]), metadata={"ss_network_module": "networks.lora"}
    )


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    file = write_kohya(folder / "kohya.safetensors", 200 if small else KEYS)
    ours, theirs = [], []
    for _ in range(1 if small else 7):
        ours.append(measure.adaptkit("inspect", file))
        theirs.append(measure.torch_start() if small else child(PYTHON, "-c", "import torch"))
    loaded = child(PYTHON, "-c", LOADED, "inspect", file).output.strip().splitlines()[-1]
    first, second = median([m.seconds for m in ours]), median([m.seconds for m in theirs])
    table = Table(
        title=f"inspect: {200 if small else KEYS} keys, median of {len(ours)} alternating runs"
    )
    for name in ("what", "seconds", "peak MB", "of import torch"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, runs, value in (
        ("adaptkit inspect, whole process", ours, first),
        ('python -c "import torch"', theirs, second),
    ):
        peaks = [m.peak for m in runs if m.peak is not None]
        table.add_row(
            name,
            seconds(value),
            measure.megabytes(max(peaks, default=None)),
            ratio(value, second),  # type: ignore[type-var]
        )
    console.print(table)
    console.print(f"torch imported by inspect: {'yes' if loaded == 'True' else 'no'}")
    missed = ["inspect imports torch"] if loaded == "True" else []
    if not small and first > LIMIT * second:
        missed.append(
            f"inspect takes {first / second:.2f} of the time of importing torch, limit {LIMIT}"
        )
    return missed
