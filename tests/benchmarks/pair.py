"""A synthetic pair of checkpoints in bounded memory: `python -m tests.benchmarks.pair FOLDER [--small] [--family sdxl]`.

Headers from fixtures/checkpoints/<family>.tsv, fp16. The base is normal / √fan-in. The tuned one differs by 3 % of ‖W‖ in every
matrix of UNet and text encoder but the embeddings: half the energy of rank 64 with singular values ~ i^-0.7, half white
noise (what a real fine-tune leaves outside any small rank); and in every fourth bias and norm. The VAE is equal. Normal
numbers come from one pool, larger than any of the matrices, read from a random place on for each tensor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from adaptkit.files.header import TensorSpec
from adaptkit.files.sink import TensorSink
from tests.synth import FIXTURES, Listing, load_listing, shrink

SEED = 20240501
POOL = 1 << 25  # float32: 134 MB
SIZE = 0.03  # ‖ΔW‖ / ‖W‖
RANK = 64
POWER = 0.7
SHARE = 0.5  # of ‖ΔW‖² in the low-rank part
VECTOR = 0.01
ADAPTED = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")
BLOCK = 1 << 21  # numbers made, rounded and written at a time


def listing_of(family: str, small: bool) -> Listing:
    listing = load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")
    return shrink(listing, 16) if small else listing


def is_tuned_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and name.startswith(ADAPTED) and "embedding" not in name


class Numbers:
    def __init__(self, pool: int = POOL) -> None:
        self.random = np.random.default_rng(SEED)
        self.pool = self.random.standard_normal(pool, dtype=np.float32)

    def normal(self, count: int) -> np.ndarray:
        start = int(self.random.integers(len(self.pool)))
        if start + count <= len(self.pool):
            return self.pool[start : start + count]
        found = np.concatenate(
            [self.pool[start:], np.resize(self.pool, start + count - len(self.pool))]
        )
        return found[:count]

    def low_rank(self, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Factors of a matrix with ‖·‖² = m·n, near enough."""
        k = min(RANK, m, n)
        s = np.arange(1, k + 1, dtype=np.float32) ** -POWER
        return self.normal(m * k).reshape(m, k) * (s / np.sqrt(np.square(s).sum())), self.normal(
            k * n
        ).reshape(k, n)


def write_pair(folder: Path, small: bool = False, family: str = "sd1") -> tuple[Path, Path]:
    listing = listing_of(family, small)
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in listing.items()]
    numbers = Numbers(1 << 20 if small else POOL)
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    with (
        TensorSink(paths[0], specs, {"format": "pt"}, overwrite=True) as base,
        TensorSink(paths[1], specs, {"format": "pt"}, overwrite=True) as tuned,
    ):
        for index, (name, (_, shape)) in enumerate(listing.items()):
            one, two = _tensor(numbers, index, name, shape)
            base.put_bytes(name, memoryview(one).cast("B"))
            tuned.put_bytes(name, memoryview(two).cast("B"))
        base.commit()
        tuned.commit()
    return paths


def _tensor(
    numbers: Numbers, index: int, name: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (shape[0] if shape else 1), int(np.prod(shape[1:]))
    if len(shape) < 2:
        base = (("norm" in name and name.endswith("weight")) + 0.02 * numbers.normal(rows)).astype(
            np.float16
        )
        if index % 4 or not name.startswith(ADAPTED):
            return base, base
        return base, (base + VECTOR * numbers.normal(rows)).astype(np.float16)
    scale = np.float32(1 / np.sqrt(columns))
    source = numbers.normal(rows * columns).reshape(rows, columns)
    base = np.empty((rows, columns), np.float16)
    tuned = np.empty_like(base) if is_tuned_matrix(name, shape) else base
    if tuned is not base:
        left, right = numbers.low_rank(rows, columns)
        noise = numbers.normal(rows * columns).reshape(rows, columns)
        left = left * (scale * np.float32(SIZE * np.sqrt(SHARE)))
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        cut = slice(start, start + step)
        base[cut] = source[cut] * scale
        if tuned is not base:
            change = left[cut] @ right
            change += noise[cut] * (scale * np.float32(SIZE * np.sqrt(1 - SHARE)))
            change += base[cut]
            tuned[cut] = change
    return base, tuned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--family", default="sd1")
    options = parser.parse_args()
    started = time.perf_counter()
    made = write_pair(options.folder, options.small, options.family)
    sizes = [path.stat().st_size for path in made]
    print(json.dumps({"sizes": sizes, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
