"""`gpu`: what a device does, and merge and extraction of an SDXL-sized pair against the transfer of its bytes.

Without a device it says so; `--device cpu --small` shows that it works.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import PYTHON, Measured, child, module, ratio, seconds

RUNS = 2  # of each command, of which the faster counts: the first may read from the disk


def run(folder: Path, console: Console, small: bool, device: str = "") -> list[str]:
    """Returns what was missed (nothing: the counts of `on_device_counts.py` hold the path to its bounds)."""
    device = device or module("device").json()["device"]
    if not device:
        console.print("gpu: torch has no device here; --device cpu --small shows that it works")
        return []
    found = module("device", device, *(["--small"] if small else [])).json()
    console.print(_copies(found))
    console.print(_kernels(found["kernels"]))
    rates = {row["what"]: row["rate"] for row in found["transfers"]}
    console.print(_commands(folder, small, device, rates))
    return []


def _copies(found: dict[str, Any]) -> Table:
    table = Table(title=f"gpu: {found['name']}, fp16; LoRA of rank 32, LoKr of factor 8")
    for column in ("what", "GB/s", "of a copy"):
        table.add_column(column, justify="left" if column == "what" else "right")
    copy = found["copies"][0]["rate"]
    for row in found["copies"]:
        table.add_row(row["what"], f"{row['rate'] / 1e9:.1f}", f"{100 * row['rate'] / copy:.0f} %")
    for row in found["transfers"]:
        table.add_row(row["what"], f"{row['rate'] / 1e9:.1f}", "")
    return table


def _kernels(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="gpu: a layer of a stack, and the same one by one")
    for column in ("what", "ms batched", "ms looped", "times as fast"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        one, other = row["batched"], row["looped"]
        table.add_row(row["what"], f"{1e3 * one:.3f}", f"{1e3 * other:.3f}", f"{other / one:.1f}")
    return table


def _commands(folder: Path, small: bool, device: str, rates: dict[str, float]) -> Table:
    """Extraction and merge end to end, less the start of torch, against the transfer of the same bytes."""
    paths = {
        name: folder / f"{name}.safetensors" for name in ("base", "tuned", "lora", "lokr", "out")
    }
    module("pair", folder, "--family", "sdxl", *(["--small"] if small else []))
    size = paths["base"].stat().st_size
    code = f"import torch, adaptkit.ops.extract; torch.zeros(1, device={device!r})"
    start = min(child(PYTHON, "-c", code).seconds for _ in range(1 if small else RUNS))
    copied = _copied(paths["base"], paths["out"])
    sent, back = size / rates["to the device"], size / rates["back"]
    pair = ("extract", paths["base"], paths["tuned"])
    jobs = {
        "extract, LoRA of rank 32": ((*pair, "--rank", "4" if small else "32", "-o", paths["lora"]), 2 * sent),
        "extract, LoKr of factor 8": ((*pair, "--algo", "lokr", "--factor", "8", "-o", paths["lokr"]), 2 * sent),
        "merge of that LoRA": (("merge", paths["base"], paths["lora"], "-o", paths["out"]), sent + back),
        "merge of that LoKr": (("merge", paths["base"], paths["lokr"], "-o", paths["out"]), sent + back),
    }  # fmt: skip
    table = Table(
        title=f"gpu: SDXL, {size / 1e9:.1f} GB a file; cp {seconds(copied)} s; start of torch {seconds(start)} s, not counted"
    )
    for column in ("what", "seconds", "transfer s", "times", "of cp"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, (command, floor) in list(jobs.items())[1::2] if small else jobs.items():
        took = min(_run(command, device).seconds for _ in range(1 if small else RUNS)) - start
        table.add_row(what, seconds(took), seconds(floor), ratio(took, floor), ratio(took, copied))
    for path in paths.values():
        path.unlink(missing_ok=True)
    return table


def _run(command: tuple[str | Path, ...], device: str) -> Measured:
    measure.settle()
    return measure.adaptkit(*command, "--device", device, "--overwrite", "--json")


def _copied(source: Path, target: Path) -> float:
    measure.settle()
    started = time.perf_counter()
    shutil.copyfile(source, target)
    return time.perf_counter() - started
