"""`linalg`: the kernels against LAPACK, in this process: `python -m tests.benchmarks.kernels [--small]` prints JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptkit.linalg.kron.blocks import factorization, rearrange
from adaptkit.linalg.kron.nearest import nearest_kron
from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

T = TypeVar("T")

SIZES = (
    (320, 320),
    (768, 768),
    (1280, 1280),
    (1280, 5120),
    (10240, 1280),
    (640, 5760),
    (1280, 11520),
)
SMALL = ((96, 64), (320, 320))
RANK = 32
FACTOR = 8


def timed(run: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def difference(m: int, n: int, seed: int = 0) -> Tensor:
    """Like those of `pair`: half the energy of rank 64, singular values ~ i^-0.7, half white noise."""
    draw = torch.Generator().manual_seed(seed)
    k = min(64, m, n)
    s = torch.arange(1, k + 1).float() ** -0.7
    left, right = (
        torch.randn(m, k, generator=draw) * (s / s.norm()),
        torch.randn(k, n, generator=draw),
    )
    return (left @ right + torch.randn(m, n, generator=draw)) * 0.03 / n**0.5


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def svds(sizes: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    for m, n in sizes:
        a = difference(m, n)
        theirs, full = timed(lambda a=a: torch.linalg.svd(a, full_matrices=False))  # type: ignore[misc]
        ours, low = timed(lambda a=a: truncated_svd(a, SvdSpec(RANK)))  # type: ignore[misc]
        best = square(full[1][RANK:])
        left = square(torch.addmm(a, low.u * low.s, low.vh, alpha=-1))
        yield {
            "what": f"truncated_svd {m} × {n}",
            "ours": ours,
            "theirs": theirs,
            "excess": (left / best) ** 0.5 - 1,
        }


def krons(sizes: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    for m, n in sizes:
        x = difference(m, n)
        a, b = factorization(m, FACTOR)[0], factorization(n, FACTOR)[0]
        theirs, full = timed(
            lambda x=x, a=a, b=b: torch.linalg.svd(rearrange(x, a, b), full_matrices=False)
        )  # type: ignore[misc]
        ours, near = timed(lambda x=x, a=a, b=b: nearest_kron(x, a, b))  # type: ignore[misc]
        best = square(full[1][1:])
        left = square(x - torch.kron(near.w1, near.w2))
        yield {
            "what": f"nearest_kron {m} × {n}",
            "ours": ours,
            "theirs": theirs,
            "excess": (left / best) ** 0.5 - 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    sizes = SMALL if parser.parse_args().small else SIZES
    warm = difference(96, 96)
    torch.linalg.svd(warm)
    truncated_svd(warm, SvdSpec(8, method="lanczos"))
    print(json.dumps([*svds(sizes), *krons(sizes)]))


if __name__ == "__main__":
    main()
