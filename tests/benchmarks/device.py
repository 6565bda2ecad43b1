"""What a device does, in this process: `python -m tests.benchmarks.device DEVICE [--small]` prints JSON.

Without DEVICE the name of the one that torch has, or nothing. Every time is the best of some runs after two to warm up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.algorithms._factor import Dense
from adaptkit.algorithms.lokr import Lokr
from adaptkit.algorithms.lora import Lora
from adaptkit.linalg.factored import factored_core
from adaptkit.linalg.fused import fits, fused
from adaptkit.linalg.kron.blocks import kron_added
from adaptkit.linalg.kron.nearest import nearest_kron
from adaptkit.linalg.lowrank import SvdSpec, truncated_svd
from adaptkit.ops.merge.at_once import merged
from adaptkit.ops.merge.cutting import Part
from adaptkit.process import synchronize

LAYERS, SIDE, RANK, FACTOR = 8, 1280, 32, 8
RUNS = 7


class Bench:
    def __init__(self, device: str, small: bool) -> None:
        self.device = device
        self.layers, self.side = (3, 128) if small else (LAYERS, SIDE)
        self.wide = 4 if small else 64  # layers whose copy is measured: 210 MB, beyond any cache
        self.runs = 1 if small else RUNS
        self.draw = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(dtype).to(self.device)

    def best(self, run: Callable[[], object]) -> float:
        found = []
        for turn in range(self.runs + 2):
            synchronize(self.device)
            started = time.perf_counter()
            run()
            synchronize(self.device)
            if turn >= 2:
                found.append(time.perf_counter() - started)
        return min(found)

    def copies(self) -> Iterator[dict[str, Any]]:
        """Bandwidth on the device: a copy of W, and what a merge does, which reads W and writes W' at least."""
        n, side = self.wide, self.side
        w = self.normal(n, side, side, dtype=torch.float16)
        out, moved = torch.empty_like(w), 2 * w.nbytes
        small = side // FACTOR
        w1, w2 = self.normal(n, FACTOR, FACTOR), self.normal(n, small, small)
        lokr = Part(Lokr(Dense(w1), Dense(w2), 1.0), 0, side, None)
        lora = Part(
            Lora(self.normal(n, side, RANK), self.normal(n, RANK, side), 1.0), 0, side, None
        )
        jobs: dict[str, Callable[[], object]] = {
            "copy of W": lambda: out.copy_(w),
            "LoKr added": lambda: kron_added(w, w1, w2, 0.7, out),
            "LoKr merged, with its norms": lambda: merged(w, [(lokr, 0.7)], w.dtype, known=True),
            "LoRA merged, with its norms": lambda: merged(w, [(lora, 0.7)], w.dtype, known=False),
        }
        pairs = {"LoKr": (w1, w2), "LoRA": (lora.weights.up, lora.weights.down)}
        if self.device.startswith("cuda") and fits(w, w.dtype, (w1, w2)):
            for kind, pair in pairs.items():
                own = {"kron": kind == "LoKr"}
                jobs[f"{kind} merged, fused"] = partial(fused, w, pair, 0.7, w.dtype, **own)
        for what, job in jobs.items():
            yield {"what": what, "rate": moved / self.best(job)}

    def transfers(self) -> Iterator[dict[str, Any]]:
        there = self.normal(self.wide, self.side, self.side, dtype=torch.float16)
        here = torch.empty_like(there, device="cpu")
        pinned = torch.empty_like(here, pin_memory=self.device.startswith("cuda"))
        ahead = self.device.startswith("cuda")
        jobs: dict[str, Callable[[], object]] = {
            "to the device": lambda: there.copy_(pinned, non_blocking=ahead),
            "back": lambda: pinned.copy_(there, non_blocking=ahead),
            "to the device, pageable": lambda: there.copy_(here),
        }
        for what, job in jobs.items():
            yield {"what": what, "rate": there.nbytes / self.best(job)}

    def kernels(self) -> Iterator[dict[str, Any]]:
        """A stack of equal layers at once, and one by one."""
        n, side = self.layers, self.side
        up, down = self.normal(n, side, RANK), self.normal(n, RANK, side)
        x = up @ down / side + self.normal(n, side, side) / side**0.5
        w = self.normal(n, side, side, dtype=torch.float16)
        w1, w2 = self.normal(n, FACTOR, FACTOR), self.normal(n, side // FACTOR, side // FACTOR)

        def lora(some: slice) -> object:
            part = Part(Lora(up[some], down[some], 1.0), 0, side, None)
            return merged(w[some], [(part, 0.7)], w.dtype, known=False)

        def lokr(some: slice) -> object:
            part = Part(Lokr(Dense(w1[some]), Dense(w2[some]), 1.0), 0, side, None)
            return merged(w[some], [(part, 0.7)], w.dtype, known=True)

        jobs: dict[str, Callable[[slice], object]] = {
            "merge LoRA": lora,
            "merge LoKr": lokr,
            f"truncated_svd, rank {RANK}": lambda some: truncated_svd(x[some], SvdSpec(RANK)),
            f"nearest_kron, factor {FACTOR}": lambda some: nearest_kron(x[some], FACTOR, FACTOR),
            f"factored_core, rank {RANK}": lambda some: factored_core(up[some], down[some]),
        }
        for what, job in jobs.items():
            whole = self.best(lambda job=job: job(slice(0, n)))  # type: ignore[misc]
            each = self.best(lambda job=job: [job(slice(i, i + 1)) for i in range(n)])  # type: ignore[misc]
            yield {"what": what, "batched": whole / n, "looped": each / n}


def name_of(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return device


def available() -> str:
    """The accelerator that torch has here; empty without one."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", nargs="?")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.device is None:
        print(json.dumps({"device": available()}))
        return
    bench = Bench(options.device, options.small)
    with torch.inference_mode():
        parts = {name: list(getattr(bench, name)()) for name in ("copies", "transfers", "kernels")}
    print(json.dumps({"name": name_of(options.device), **parts}))


if __name__ == "__main__":
    main()
