"""`convert`: renaming a 340 MB SDXL LoRA against `cp`, and that it never loads torch."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adaptkit.files.header import TensorSpec, build_header
from tests.benchmarks import measure
from tests.benchmarks.inspecting import LOADED
from tests.benchmarks.measure import PYTHON, child, median, ratio, seconds
from tests.synth import FIXTURES, load_listing

SIZE = 340_000_000
FACTOR, PLUS = 1.5, 0.3  # the bound: so many times the time of `cp`, and so many seconds more
COPY = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"


def write_lora(path: Path, size: int, metadata: dict[str, str]) -> Path:
    """A kohya SDXL LoRA of about so many bytes, of random data that no file system can leave out."""
    listing = load_listing(FIXTURES / "keys" / "sdxl-kohya.tsv")
    plain = sum(2 * measure_elements(shape) for _, shape in listing.values())
    rank = max(1, round(4 * size / plain))
    specs = [
        TensorSpec(key, dtype, _ranked(key, shape, rank)) for key, (dtype, shape) in listing.items()
    ]
    head, infos = build_header(specs, metadata)
    with path.open("wb") as file:
        file.write(head)
        for key, info in infos.items():
            file.write(b"\0\0\x80\x40" if key.endswith("alpha") else os.urandom(info.nbytes))
    return path


def measure_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _ranked(key: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if not shape:
        return shape
    return (rank, *shape[1:]) if "lora_down" in key else (shape[0], rank, *shape[2:])


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    size = 4_000_000 if small else SIZE
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    plain = write_lora(folder / "plain.safetensors", size, {})
    hashed = write_lora(folder / "hashed.safetensors", size, hashes)
    missed: list[str] = []
    measure.adaptkit("formats")  # compiles what a first start compiles
    table = Table(
        title=f"convert --to comfy: {plain.stat().st_size / 1e6:.0f} MB, median of alternating runs"
    )
    for name in ("what", "seconds", "peak MB", "of the copy"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for title, source in (("renamed", plain), ("renamed, sshs hashes recomputed", hashed)):
        copied, ours = _alternating(source, folder, 1 if small else 7)
        first, second = median([m.seconds for m in copied]), median([m.seconds for m in ours])
        table.add_row("cp", seconds(first), "", "1")
        peak = max((m.peak for m in ours if m.peak is not None), default=None)
        table.add_row(
            f"adaptkit, {title}", seconds(second), measure.megabytes(peak), ratio(second, first)
        )
        # the bound is the renaming's: two hashes of every byte take 0.2 s of their own
        if not small and source is plain and second > FACTOR * first + PLUS:
            missed.append(
                f"{title}: {second:.2f} s, the bound is {FACTOR} × {first:.2f} + {PLUS} s"
            )
    console.print(table)
    target = folder / "checked.safetensors"
    output = child(PYTHON, "-c", LOADED, "convert", plain, "--to", "comfy", "-o", target).output
    loaded = output.strip().splitlines()[-1]
    console.print(f"torch imported by convert: {'yes' if loaded == 'True' else 'no'}")
    for path in (plain, hashed, target):
        path.unlink()
    return [*missed, *(["convert imports torch"] if loaded == "True" else [])]


def _alternating(
    source: Path, folder: Path, runs: int
) -> tuple[list[measure.Measured], list[measure.Measured]]:
    copied, ours = [], []
    copy = ["cp"] if os.name == "posix" else [PYTHON, "-c", COPY]
    for _ in range(runs):
        for results, command in (
            (copied, [*copy, source, folder / "copy.safetensors"]),
            (
                ours,
                [
                    PYTHON,
                    "-m",
                    "adaptkit",
                    "convert",
                    source,
                    "--to",
                    "comfy",
                    "-o",
                    folder / "out.safetensors",
                ],
            ),
        ):
            measure.settle()
            results.append(child(*command))
            Path(command[-1]).unlink()
    return copied, ours
