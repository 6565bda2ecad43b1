"""What commands take beyond what they began with, against what their plans promise.

`python -m tests.ops.peaks [verb …]` prints a table over verbs, kinds and three sizes of a layer. Linux alone tells the peak.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from adaptkit.ops import advise, batch, combine, compare, convert, extract, merge, resize
from adaptkit.steps import peak_memory
from tests.ops.peak_files import (
    KINDS,
    PACKED,
    PEFT,
    TO_Q,
    TO_Q_OF_DIFFUSERS,
    adapter,
    checkpoints,
    of_sd_scripts,
    packed,
    recipe,
)

SIZES = ((1280, 1280), (2560, 1280), (1024, 4096))
LOADING = 4.0  # seconds
FIXED = 2_500_000  # bytes: tables, code that is loaded, pages of 4 KB
MALLOC = {"MMAP_THRESHOLD_": 1 << 17, "TRIM_THRESHOLD_": 1 << 17, "ARENA_MAX": 1}
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def available() -> bool:
    return STATUS.exists() and RESET.exists()


def _status(key: str, path: Path = STATUS) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak(call: Callable[[], object]) -> int:
    """The most memory that a call holds at once, beyond what the process held before."""
    gc.collect()
    with suppress(OSError, AttributeError):  # what the C library kept of earlier calls
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    RESET.write_text("5", encoding="ascii")
    call()
    return _status("VmHWM") - before


class Children:
    """What the processes of a batch hold at most, beyond what they held after the first small jobs."""

    def __init__(self, first: int) -> None:
        self.first, self.done = first, 0
        self.held: dict[Path, list[int]] = {}
        self.most: dict[Path, int] = {}

    def told(self, _: object) -> None:
        """After each job: the processes wait for the next one, or have just begun it."""
        self.done += 1
        if self.done == 1:  # the others load libraries, and no job is given out meanwhile
            time.sleep(LOADING)
        for folder in _children():
            if self.done <= self.first:
                held = self.held.setdefault(folder, [])
                held.append(_status("VmRSS", folder / "status"))
                (folder / "clear_refs").write_text("5", encoding="ascii")
            else:
                most = _status("VmHWM", folder / "status")
                self.most[folder] = max(most, self.most.get(folder, 0))

    @property
    def taken(self) -> int:
        # one of them may have begun a large job
        return sum(most - min(self.held[folder][-2:]) for folder, most in self.most.items())


def _children() -> Iterator[Path]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended
            text = stat.read_text(encoding="utf-8", errors="replace")
            if int(text.rpartition(")")[2].split()[1]) == os.getpid():
                yield stat.parent


@dataclass(frozen=True)
class Case:
    """One command on files whose largest layer is `rows` × `columns`."""

    label: str
    op: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def output(self) -> str:
        """A folder for keys of PEFT, a GGUF for one that keeps its types, else a file."""
        first = self.inputs[0]
        if self.op is merge and first.suffix == ".gguf":
            return "made.gguf"
        return "made" if isinstance(first, Path) and first.is_dir() else "made.safetensors"

    def plan(self, folder: Path) -> Any:
        writes = self.op not in (compare, advise)
        place = {"output": folder / self.output, "overwrite": True} if writes else {}
        return self.op.plan(*self.inputs, self.op.Options(device="cpu", **self.options, **place))

    def promised(self, folder: Path) -> int:
        plan = self.plan(folder)
        with suppress(AttributeError):
            plan.close()
        if not hasattr(plan, "to_dict"):
            return peak_memory(plan.steps)
        return int(plan.to_dict()["peak_memory"])

    def taken(self, folder: Path) -> int:
        plan = self.plan(folder)
        return peak(lambda: self.op.run(plan))


@dataclass(frozen=True)
class Batch:
    """Jobs in as many processes, which do small ones first: libraries are loaded then."""

    label: str
    small: list[dict[str, Any]]
    large: list[dict[str, Any]]

    def plan(self, folder: Path, jobs: list[dict[str, Any]]) -> Any:
        for used in folder.glob("recipe*"):
            used.unlink()
        made = recipe(folder / "recipe.toml", jobs)
        return batch.plan(made, batch.Options(jobs=len(self.large), overwrite=True))

    def promised(self, folder: Path) -> int:
        return int(batch.preview(self.plan(folder, self.large)).peak_memory)

    def taken(self, folder: Path) -> int:
        children = Children(len(self.small))
        kept = {f"MALLOC_{name}": str(number) for name, number in MALLOC.items()}
        with mock.patch.dict(os.environ, kept):
            report = batch.run(self.plan(folder, self.small + self.large), tell=children.told)
        assert report.count("done") == len(self.small + self.large)
        return children.taken


EXTRACTS: dict[str, dict[str, Any]] = {
    "lora": {}, "rank 4": {"rank": 4}, "rank 128": {"rank": 128}, "exact": {"svd": "exact"},
    "lokr": {"algo": "lokr"}, "lokr factor 2": {"algo": "lokr", "factor": 2},
    "lokr rank 16": {"algo": "lokr", "rank": 16}, "full": {"algo": "full"},
    "energy": {"energy": 0.5}, "auto": {"algo": "auto", "size": 2_000_000},
}  # fmt: skip


# kinds whose change depends on the weight: it is given
BASED = ("dora", "dora-input", "oft", "boft", "glora", "ia3", "tlora", "pissa", "olora")
CONVERTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((kind, {"algo": "full"}) for kind in ("lora", "lokr", "dora", "oft", "boft")),
    *(
        (kind, {"algo": "lora"})
        for kind in ("lokr", "full", "hra", "dora", "fourierft", "pissa", "olora")
    ),
    ("lora", {"algo": "lokr"}),
    ("lora", {"dtype": "fp16"}),
)
COMPARES = (  # the last one: with the base
    ("lora", "lokr", False),
    ("lora", "tuned", True),
    ("full", "lora", False),
    ("full", "loha", False),
    ("full", "full", False),
    ("oft", "tuned", True),
    ("hra", "tuned", True),
    ("dora", "tuned", True),
)


def jobs_of(name: str, count: int, folder: Path, rows: int, columns: int) -> list[dict[str, Any]]:
    """So many extractions, for `batch`."""
    base, tuned = (
        str(folder / f"{side}-{rows}-{columns}.safetensors") for side in ("base", "tuned")
    )
    return [
        {
            "command": "extract",
            "base": base,
            "tuned": tuned,
            "output": f"{name}-{n}.safetensors",
        }
        for n in range(count)
    ]


def cases(folder: Path, rows: int, columns: int) -> Iterator[Case | Batch]:
    """Every verb on a layer of this size, with the files that it takes."""
    size = rows, columns
    checkpoints(64, 64, folder)
    at = checkpoints(*size, folder)
    at |= {kind: adapter(kind, *size, folder) for kind in (*KINDS, *PEFT)}
    pair, base = (at["base"], at["tuned"]), {"base": at["base"]}
    for label, options in EXTRACTS.items():
        yield Case(f"extract {label}", extract, pair, options)
    yield Case("extract lora fp8", extract, (at["fp8"], at["tuned"]), {})
    for kind in (*KINDS, *PEFT):
        yield Case(f"merge {kind}", merge, (at["base"], [(at[kind], 1.0)]), {})
    for kind in ("lora", "lokr", "dora", "oft", "hra", "full"):
        yield Case(f"merge {kind} verify", merge, (at["base"], [(at[kind], 1.0)]), {"verify": True})
    for kind in ("lora", "oft"):
        yield Case(f"merge {kind} fp8", merge, (at["fp8"], [(at[kind], 1.0)]), {})
    for kind in PACKED:
        base_of = packed(kind, *size, folder)
        yield Case(f"merge lora {kind}", merge, (base_of, [(at["lora"], 1.0)]), {})
        yield Case(f"merge oft {kind}", merge, (base_of, [(at["oft"], 1.0)]), {})
        yield Case(f"extract lora {kind}", extract, (base_of, at["tuned"]), {})
        yield Case(f"extract energy {kind}", extract, (base_of, at["tuned"]), {"energy": 0.5})
    sdxl, turned = of_sd_scripts(*size, folder)
    yield Case("merge kohya-oft", merge, (sdxl, [(turned, 1.0)]), {"family": "sdxl"})
    yield Batch(
        "batch --jobs 2", jobs_of("small", 4, folder, 64, 64), jobs_of("large", 2, folder, *size)
    )
    yield Case("advise", advise, pair, {})
    for one, other, options in COMPARES:
        given = base if options else {}
        yield Case(f"compare {one} {other}", compare, ((at[one], 1.0), (at[other], 1.0)), given)
    for kind, options in CONVERTS:
        label = " ".join(map(str, options.values()))
        given = base if kind in ("hra", "fourierft", *BASED) else {}
        yield Case(f"convert {kind} {label}", convert, (at[kind],), {**options, **given})
    sd: dict[str, Any] = {"family": "sdxl"}
    adalora = adapter("adalora", *size, folder, TO_Q_OF_DIFFUSERS)
    yield Case("convert adalora lora", convert, (adalora,), {"algo": "lora", **sd})
    loha = adapter("loha", *size, folder, f"lora_unet_{TO_Q.replace('.', '_')}")
    for algo in ("full", "lora"):
        yield Case(f"convert loha {algo}", convert, (loha,), {"algo": algo, **sd})
    yield Case("resize loha lora", resize, (loha,), {"algo": "lora", "rank": 8, **sd})
    factored = adapter("lokr-factored", *size, folder, f"lora_unet_{TO_Q.replace('.', '_')}")
    yield Case("resize lokr-factored", resize, (factored,), {"rank": 4, **sd})
    yield Case("convert lokr-factored fp16", convert, (factored,), {"dtype": "fp16", **sd})
    yield Case("convert lokr fp16", convert, (at["lokr"],), {"dtype": "fp16"})
    yield Case(
        "compare lokr-factored", compare, ((factored, 1.0), (factored, 0.5)), {"family": "sdxl"}
    )
    for kind, rank in (("full", 16), ("lora", 4), ("lokr", 4), ("dora", 4)):
        yield Case(f"resize {kind}", resize, (at[kind],), {"rank": rank})
    yield Case("resize oft lora", resize, (at["oft"],), {"rank": 8, "algo": "lora", **base})
    yield Case("resize dora base", resize, (at["dora"],), {"rank": 4, **base})
    both = [(at["lora"], 0.5), (at["lokr"], 0.5)]
    yield Case("combine lora lokr", combine, (both,), {"rank": 8})
    yield Case("combine lora lora", combine, ([(at["lora"], 0.5), (at["lora"], 0.7)],), {})
    yield Case("combine ties", combine, (both,), {"method": "ties", "density": 0.5})


def give_back() -> None:
    """Let the C library give freed blocks back to the system at once, not keep them for later."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in zip((-3, -1, -8), MALLOC.values(), strict=True):
            library.mallopt(parameter, value)  # in the order of MALLOC


def rows_of(only: list[str], sizes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, int]]:
    """(label, promised, taken) of each case."""
    give_back()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for rows, columns in ((64, 64), *sizes):  # the first one loads the libraries
            for case in cases(folder, rows, columns):
                if only and case.label not in only and case.label.split()[0] not in only:
                    continue
                promised, taken = case.promised(folder), case.taken(folder)
                if rows > 64:
                    yield f"{rows} x {columns} {case.label}", promised, taken


def keeps(promised: int, taken: int) -> bool:
    """Within 15 %, but for what does not depend on the layer."""
    return 0.85 * promised - FIXED <= taken <= 1.15 * promised + FIXED


def main(only: list[str]) -> None:
    sizes = SIZES
    if only[:1] == ["small"]:
        only, sizes = only[1:], SIZES[:1]
    bad = 0
    for label, promised, taken in rows_of(only, sizes):
        bad += not keeps(promised, taken)
        mark = "" if keeps(promised, taken) else "  WRONG"
        shown = f"promised {promised / 1e6:7.1f} MB, taken {taken / 1e6:7.1f}"
        print(f"{label:32} {shown}, x {taken / promised:4.2f}{mark}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(sys.argv[1:])
