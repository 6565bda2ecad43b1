"""`resize`: from the factors against the usual loop of dense SVDs, and an SDXL LoRA brought to a size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.table import Table

from adaptkit.files.header import read_header
from tests.benchmarks import measure
from tests.benchmarks.measure import child, median, ratio, seconds

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

RANK, KEPT = 64, 16
COMPUTE, WHOLE = (
    150,
    25,
)  # the bounds: so many times faster than the dense loop, computing alone and as whole processes
IMPORTS, PEAK = (
    2.5,
    1_000_000_000,
)  # an SDXL LoRA: so many times the import of torch, and so many bytes
BUDGET = 128_000_000


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    rank = str(4 if small else RANK)
    unet = "lora_unet_.*down_blocks_0_attentions_0" if small else "lora_unet_.*attentions"
    sd15, big = folder / "sd15.safetensors", folder / "sdxl.safetensors"
    measure.module("lora", sd15, "sd1-kohya.tsv", unet, rank)
    missed = _against_dense(sd15, folder, console, small)
    measure.module(
        "lora", big, "sdxl-kohya.tsv", "lora_unet_.*_4_1_" if small else "lora_unet_", rank
    )
    missed += _to_size(big, folder, console, small)
    for path in (sd15, big):
        path.unlink()
    return missed


def _fresh(target: Path) -> Path:
    """A path with nothing there: a file that is replaced is waited for until the disk has it."""
    target.unlink(missing_ok=True)
    return target


def _modules(path: Path) -> int:
    return sum(key.endswith("lora_up.weight") for key in read_header(path).infos)


def _against_dense(source: Path, folder: Path, console: Console, small: bool) -> list[str]:
    kept = 2 if small else KEPT
    target = folder / "resized.safetensors"
    dense = measure.module("dense_resize", source, folder / "dense.safetensors", str(kept))
    computing = float(dense.output.strip().splitlines()[-1])
    runs = [
        measure.adaptkit("resize", source, "--rank", str(kept), "-o", _fresh(target), "--json")
        for _ in range(1 if small else 5)
    ]
    ours = median([r.seconds for r in runs])
    alone = measure.module("resize_alone", source, target, str(kept), *(["1"] if small else []))
    compute = float(alone.output.strip().splitlines()[-1])
    table = Table(
        title=f"resize --rank {kept}: {_modules(source)} modules of {source.stat().st_size / 1e6:.0f} MB"
    )
    for name in ("what", "whole process", "computing", "peak MB"):
        table.add_column(name, justify="left" if name == "what" else "right")
    table.add_row(
        "dense SVD of each",
        seconds(dense.seconds),
        seconds(computing),
        measure.megabytes(dense.peak),
    )
    table.add_row(
        "adaptkit",
        seconds(ours),
        seconds(compute),
        measure.megabytes(max(r.peak or 0 for r in runs)),
    )
    table.add_row("ratio", ratio(dense.seconds, ours), ratio(computing, compute), "")
    console.print(table)
    for path in (target, folder / "dense.safetensors"):
        path.unlink()
    if small:
        return []
    bounds = (
        ("computing", computing, compute, COMPUTE),
        ("whole process", dense.seconds, ours, WHOLE),
    )
    return [
        f"resize, {what}: {a / b:.0f} times, at least {least}"
        for what, a, b, least in bounds
        if a < least * b
    ]


def _to_size(source: Path, folder: Path, console: Console, small: bool) -> list[str]:
    budget = source.stat().st_size // 2 if small else BUDGET
    target = folder / "sized.safetensors"
    torches, ours = [], []
    child(measure.PYTHON, "-c", measure.TORCH)
    for _ in range(1 if small else 5):
        measure.settle()
        torches.append(child(measure.PYTHON, "-c", measure.TORCH))
        ours.append(
            measure.adaptkit(
                "resize", source, "--size", str(budget), "-o", _fresh(target), "--json"
            )
        )
    start, whole = median([r.seconds for r in torches]), median([r.seconds for r in ours])
    peak = max(r.peak or 0 for r in ours)
    size = target.stat().st_size
    table = Table(
        title=f"resize --size {budget / 1e6:.0f}MB: {_modules(source)} modules of {source.stat().st_size / 1e6:.0f} MB"
    )
    for name in ("what", "seconds", "peak MB", "of import torch"):
        table.add_column(name, justify="left" if name == "what" else "right")
    table.add_row(
        "adaptkit, whole process", seconds(whole), measure.megabytes(peak), ratio(whole, start)
    )
    table.add_row(
        'python -c "import torch"', seconds(start), measure.megabytes(torches[0].peak), "1"
    )
    console.print(table)
    report = _report(ours[-1].output)
    console.print(
        f"relative error {report['relative_error']:.4f}, {size / budget:.4%} of the budget used"
    )
    target.unlink()
    if small:
        return []
    missed = [f"resize --size: {size} bytes of {budget}"] * (not 0.99 * budget <= size <= budget)
    missed += [f"resize --size: {whole / start:.2f} times the import of torch"] * (
        whole > IMPORTS * start
    )
    return missed + [f"resize --size: {peak / 1e6:.0f} MB"] * (peak > PEAK)


def _report(output: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(output)
    return found
