"""What commands take beyond what they began with, against what their plans promise.

`python -m tests.ops.peaks [verb …]` prints a table over verbs, kinds and three sizes of a layer. Linux alone tells the peak.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptkit.ops import advise, combine, compare, convert, extract, merge, resize
from adaptkit.steps import peak_memory

SIZES = ((1280, 1280), (2560, 1280), (1024, 4096))
FIXED = 2_500_000  # bytes: tables, code that is loaded, pages of 4 KB
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
NAME = "transformer.blocks.0.layer"


def available() -> bool:
    return STATUS.exists() and RESET.exists()


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
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


@dataclass(frozen=True)
class Case:
    """One command on files whose largest layer is `rows` × `columns`."""

    label: str
    op: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any]

    def plan(self, folder: Path) -> Any:
        writes = self.op not in (compare, advise)
        place = {"output": folder / "made.safetensors", "overwrite": True} if writes else {}
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


def _module(kind: str, rows: int, columns: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.01

    r = 8
    low = {"lora_up.weight": normal(rows, r), "lora_down.weight": normal(r, columns)}
    match kind:
        case "lora":
            found = low
        case "dora":
            found = {**low, "dora_scale": torch.ones(rows, 1)}
        case "lokr":
            found = {"lokr_w1": normal(8, 8), "lokr_w2": normal(rows // 8, columns // 8)}
        case "lokr-factored":
            a, b = normal(rows // 4, r), normal(r, columns // 4)
            found = {"lokr_w1": normal(4, 4), "lokr_w2_a": a, "lokr_w2_b": b}
        case "loha":
            pairs = (("a", (rows, r)), ("b", (r, columns)))
            found = {f"hada_w{n}_{side}": normal(*shape) for n in "12" for side, shape in pairs}
        case "oft":
            found = {"oft_blocks": normal(rows // 32, 32, 32), "alpha": torch.tensor(0.0)}
        case "boft":
            found = {"oft_blocks": normal(2, rows // 32, 32, 32), "alpha": torch.tensor(0.0)}
        case "glora":
            shapes = {"a1": (columns, r), "a2": (r, columns), "b1": (rows, r), "b2": (r, columns)}
            found = {f"{role}.weight": normal(*shape) for role, shape in shapes.items()}
        case "full":
            found = {"diff": normal(rows, columns)}
        case _:
            raise ValueError(kind)
    return {f"{NAME}.{role}": tensor for role, tensor in found.items()}


KINDS = ("lora", "lokr", "lokr-factored", "loha", "dora", "oft", "boft", "glora", "full")
EXTRACTS: dict[str, dict[str, Any]] = {
    "lora": {}, "rank 4": {"rank": 4}, "rank 128": {"rank": 128}, "exact": {"svd": "exact"},
    "lokr": {"algo": "lokr"}, "lokr factor 2": {"algo": "lokr", "factor": 2},
    "lokr rank 16": {"algo": "lokr", "rank": 16}, "full": {"algo": "full"},
    "energy": {"energy": 0.5}, "auto": {"algo": "auto", "size": 2_000_000},
}  # fmt: skip


CONVERTS = (
    ("lora", "full"),
    ("lokr", "full"),
    ("lokr", "lora"),
    ("full", "lora"),
    ("lora", "lokr"),
)


def cases(folder: Path, rows: int, columns: int) -> Iterator[Case]:
    """Every verb on a layer of this size, with the files that it takes."""
    draw = torch.Generator().manual_seed(0)
    base = {
        "blocks.0.layer.weight": (torch.randn(rows, columns, generator=draw) / columns**0.5).half(),
        "blocks.1.layer.weight": torch.randn(64, 64, generator=draw).half(),
    }
    tuned = {
        key: (w.float() + torch.randn(w.shape, generator=draw) * 0.01 / columns**0.5).half()
        for key, w in base.items()
    }
    made = {"base": base, "tuned": tuned, **{k: _module(k, rows, columns, draw) for k in KINDS}}
    at = {name: folder / f"{name}-{rows}-{columns}.safetensors" for name in made}
    for name, state in made.items():
        save_file({k: t.contiguous() for k, t in state.items()}, at[name], {"format": "pt"})
    pair = at["base"], at["tuned"]
    for label, options in EXTRACTS.items():
        yield Case(f"extract {label}", extract, pair, options)
    for kind in KINDS:
        yield Case(f"merge {kind}", merge, (at["base"], [(at[kind], 1.0)]), {})
    yield Case("merge dora verify", merge, (at["base"], [(at["dora"], 1.0)]), {"verify": True})
    yield Case("advise", advise, pair, {})
    yield Case("compare lora lokr", compare, ((at["lora"], 1.0), (at["lokr"], 1.0)), {})
    yield Case("compare lora tuned", compare, ((at["lora"], 1.0), (at["tuned"], 1.0)), {"base": at["base"]})  # fmt: skip
    yield Case("compare full lora", compare, ((at["full"], 1.0), (at["lora"], 1.0)), {})
    for kind, algo in CONVERTS:
        yield Case(f"convert {kind} {algo}", convert, (at[kind],), {"algo": algo})
    yield Case("convert lora fp16", convert, (at["lora"],), {"dtype": "fp16"})
    yield Case("resize full", resize, (at["full"],), {"rank": 16})
    yield Case("resize lora", resize, (at["lora"],), {"rank": 4})
    yield Case("resize lokr", resize, (at["lokr"],), {"rank": 4})
    yield Case("combine lora lokr", combine, ([(at["lora"], 0.5), (at["lokr"], 0.5)],), {"rank": 8})


def give_back() -> None:
    """Let the C library give freed blocks back to the system at once, not keep them for later."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in ((-3, 1 << 17), (-1, 1 << 17), (-8, 1)):
            library.mallopt(parameter, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


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
