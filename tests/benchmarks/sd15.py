"""`sd15`: extraction and merge of full-size SD 1.5 checkpoints (fp16, 2.1 GB each), time and peak memory.

The usual extraction is that of sd-scripts (`networks/extract_lora_from_models.py`), whose `torch.linalg.svd(mat)` makes
square factors too; beside it stands the same loop without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import PYTHON, Measured, child, megabytes, module, ratio, seconds

LIMIT = 1_000_000_000  # bytes resident, torch included
DENSE = 25  # the bound: so many times faster than the usual loop of dense SVDs
READING = 3  # and LoKr in at most so many times the time of reading and subtracting both files
RUNS = 3  # of each command, of which the median counts: the first may find memory that the system has yet to fetch
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of one adapter: a batch
COPY = "import os, shutil, sys; shutil.copyfile(*sys.argv[1:]); file = open(sys.argv[2], 'r+b'); os.fsync(file.fileno())"


@dataclass
class Row:
    what: str
    measured: Measured
    limited: bool = False
    against: str = ""  # the obvious way to do the same
    estimate: float | None = None  # seconds, where `measured` ran only a sample
    note: str = ""

    @property
    def seconds(self) -> float:
        return self.measured.seconds if self.estimate is None else self.estimate

    @property
    def missed(self) -> bool:
        return self.limited and self.measured.peak is not None and self.measured.peak > LIMIT


class Runs:
    def __init__(self, folder: Path, console: Console, small: bool) -> None:
        self.folder, self.console, self.small = folder, console, small
        self.rows: dict[str, Row] = {}

    def path(self, name: str) -> Path:
        path = self.folder / f"{name}.safetensors"
        if name not in ("base", "tuned"):
            path.unlink(missing_ok=True)
        return path

    def add(
        self,
        name: str,
        what: str,
        run: Callable[[], Measured],
        *,
        limited: bool = False,
        against: str = "",
    ) -> Row:
        found = []
        for _ in range(RUNS if limited and not self.small else 1):
            measure.settle()
            found.append(run())
        self.rows[name] = row = Row(what, _typical(found), limited, against)
        times = " · ".join(seconds(one.seconds) for one in found)
        self.console.print(f"  {what}: {times} s, {megabytes(row.measured.peak)} MB")
        return row

    def everything(self) -> None:
        base, tuned, lora, lokr = (
            self.folder / f"{n}.safetensors" for n in ("base", "tuned", "lora", "lokr")
        )
        merged, copy, plain = self.path("merged"), self.path("copy"), self.path("plain")
        made = module("pair", self.folder, *(["--small"] if self.small else []))
        sizes = made.json()["sizes"]
        self.console.print(
            f"  pair of {sizes[0] / 1e6:.0f} MB each: {seconds(made.seconds)} s, {megabytes(made.peak)} MB"
        )
        self.add(
            "cp", "cp of the base", lambda: self._cp(base, copy)
        )  # the first finds no free pages, the second does
        self.add("cp", "cp of the base, again", lambda: self._cp(base, copy))
        self.add(
            "sync",
            "copy of the base, synced to disk",
            lambda: child(PYTHON, "-c", COPY, base, copy),
        )
        copy.unlink()
        self.add("torch", 'python -c "import torch"', measure.torch_start)
        self.add(
            "lora",
            "extract --algo lora --rank 32",
            lambda: measure.adaptkit(
                "extract", base, tuned, "--rank", "32", "-o", lora, "--overwrite", "--json"
            ),
            limited=True,
            against="plain extract",
        )
        self.add(
            "lokr",
            "extract --algo lokr --factor 8",
            lambda: measure.adaptkit(
                "extract",
                base,
                tuned,
                "--algo",
                "lokr",
                "--factor",
                "8",
                "-o",
                lokr,
                "--overwrite",
                "--json",
            ),
            limited=True,
        )
        self.add(
            "merge",
            "merge of that LoRA",
            lambda: measure.adaptkit("merge", base, lora, "-o", merged, "--overwrite", "--json"),
            limited=True,
            against="plain merge",
        )
        merged.unlink()
        self.add(
            "merge lokr",
            "merge of that LoKr",
            lambda: measure.adaptkit("merge", base, lokr, "-o", merged, "--overwrite", "--json"),
            limited=True,
        )
        merged.unlink()
        self.add(
            "batch", f"batch: that LoRA at {len(STRENGTHS)} strengths", self._batch, limited=True
        )
        self._forget()
        self.add(
            "subtract",
            "both files read and subtracted",
            lambda: module("obvious", "subtract", base, tuned),
        )
        self._dense("usual extract", "LoRA as sd-scripts extracts it", base, tuned, "--square")
        self._dense("plain extract", "the same without square factors", base, tuned)
        self.add(
            "plain merge", "obvious merge", lambda: module("obvious", "merge", base, lora, plain)
        )
        plain.unlink()

    def _dense(self, name: str, what: str, *arguments: str | Path) -> None:
        row = self.add(name, what, lambda: module("obvious", "extract", *arguments))
        found = row.measured.json()
        row.estimate = found["estimate"]
        row.note = f"extrapolated: SVD of {found['sampled']:.0f} of {found['layers']:.0f} layers, one of each shape"

    def _batch(self) -> Measured:
        recipe = self.folder / "strengths.toml"
        recipe.write_text(
            f"""[[matrix]]
command = "merge"
base = "base.safetensors"
adapters = "lora.safetensors"
strengths = {list(STRENGTHS)}
output = "batch/{{strength}}.safetensors"
""",
            encoding="utf-8",
        )
        self._forget()
        return measure.adaptkit("batch", recipe, "--json")

    def _forget(self) -> None:
        """Nothing of an earlier batch: 17 GB of outputs."""
        import shutil

        shutil.rmtree(self.folder / "batch", ignore_errors=True)
        for log in self.folder.glob("strengths.toml.*"):
            log.unlink()

    def _cp(self, base: Path, copy: Path) -> Measured:
        import shutil

        if shutil.which("cp"):
            return child("cp", base, copy)
        return child(PYTHON, "-c", "import shutil, sys; shutil.copyfile(*sys.argv[1:])", base, copy)

    def table(self) -> Table:
        table = Table(title="SD 1.5, fp16" + (", widths divided by 16" if self.small else ""))
        for name in ("what", "seconds", "CPU s", "peak MB", "× cp", "of obvious", "note"):
            table.add_column(name, justify="left" if name in ("what", "note") else "right")
        copied = self.rows["cp"].seconds
        for row in self.rows.values():
            against = self.rows.get(row.against)
            note = row.note
            if row.limited:
                note = f"peak {'over' if row.missed else 'within'} {LIMIT / 1e9:.1f} GB"
            table.add_row(
                row.what,
                ("~" if row.estimate else "") + seconds(row.seconds),
                "–" if row.estimate else seconds(row.measured.cpu),
                megabytes(row.measured.peak),
                ratio(row.seconds, copied),
                ratio(row.seconds, against.seconds if against else None),
                note,
            )
        return table


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    runs = Runs(folder, console, small)
    console.print("sd15:")
    runs.everything()
    console.print(runs.table())
    for name in ("lora", "lokr"):
        console.print(
            f"captured by {name}: {runs.rows[name].measured.json()['captured']:.4f} of ‖ΔW‖²"
        )
    lora, lokr, subtract = (runs.rows[name].seconds for name in ("lora", "lokr", "subtract"))
    usual, plain = (runs.rows[name].seconds for name in ("usual extract", "plain extract"))
    console.print(
        f"LoRA: {usual / lora:.0f} times as fast as sd-scripts' loop, {plain / lora:.0f} without square factors"
    )
    console.print(f"LoKr: {lokr / subtract:.2f} times reading and subtracting both files")
    missed = [
        f"{row.what}: peak of {megabytes(row.measured.peak)} MB, limit {LIMIT / 1e6:.0f} MB"
        for row in runs.rows.values()
        if row.missed
    ]
    if small:
        return missed
    missed += [f"LoRA: {usual / lora:.1f} times as fast as the usual loop, at least {DENSE}"] * (
        usual < DENSE * lora
    )
    return missed + [f"LoKr: {lokr / subtract:.2f} times reading, at most {READING}"] * (
        lokr > READING * subtract
    )


def _typical(found: Sequence[Measured]) -> Measured:
    """The run of median time, with the highest peak of all."""
    ordered = sorted(found, key=lambda one: one.seconds)
    peaks = [one.peak for one in found if one.peak is not None]
    return replace(ordered[len(ordered) // 2], peak=max(peaks, default=None))
