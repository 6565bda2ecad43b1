"""One launch instead of several, where Triton is present and measured to be faster."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from adaptkit.process import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Contest", "fits", "fused"]

GAIN = 1.2  # times as fast as ATen: less is not worth another kernel
TURNS = 3  # of each way in a contest, the first of them to compile
STEP = 16  # of the rank at a time: the least that `tl.dot` takes
NARROW = (torch.float16, torch.bfloat16, torch.float32)

T = TypeVar("T")


def fits(stored: Tensor, dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> bool:
    """Whether `fused` can compute this on the device of W (B, m, n)."""
    known = stored.dtype in NARROW and dtype in NARROW and stored.is_contiguous()
    factors = all(t.dtype == torch.float32 and t.is_contiguous() for t in pair)
    return known and factors and stored.numel() > 0 and find_spec("triton") is not None


def fused(
    stored: Tensor, pair: tuple[Tensor, Tensor], strength: float, dtype: torch.dtype, *, kron: bool
) -> tuple[Tensor, Tensor]:
    """W + strength·ΔW rounded once to `dtype`, and its norms (3, B) in float64.

    These are ‖W‖, ‖rounding‖ and ‖strength·ΔW‖. W is (B, m, n). ΔW is w1 (B, a, b) ⊗ w2 (B, c, d)
    with `kron`, else left (B, m, r) · right (B, r, n). Both are float32 and contiguous.
    """
    from adaptkit.linalg.fused.triton_kernels import TILE, kron_kernel, product_kernel

    batch, m, n = stored.shape
    out = torch.empty_like(stored, dtype=dtype)
    grid = (batch, -(-m // TILE), -(-n // TILE))
    tiles = batch * grid[1] * grid[2]
    sums = torch.empty(3, batch, tiles // batch, dtype=torch.float32, device=stored.device)
    one, two = pair
    # Triton launches on the current device
    with torch.cuda.device_of(stored):  # type: ignore[no-untyped-call]
        if kron:
            sides = one.shape[-1], *two.shape[-2:]
            kron_kernel[grid](stored, one, two, out, sums, strength, m, n, *sides, tiles, tile=TILE)
        else:
            rank = one.shape[-1]
            product_kernel[grid](
                stored, one, two, out, sums, strength, m, n, rank, tiles, tile=TILE, step=STEP
            )
    return out, sums.sum(-1, dtype=torch.float64).sqrt_()


class Contest:
    """Which of two ways to one result is faster, measured when a kind is asked for first."""

    def __init__(self) -> None:
        self.won: dict[Hashable, bool] = {}

    def result(
        self, kind: Hashable, device: str, plain: Callable[[], T], other: Callable[[], T]
    ) -> T:
        """What `other` gives if it is GAIN times as fast as `plain`, else what `plain` gives."""
        if kind not in self.won:
            self.won[kind] = self._faster(device, plain, other)
        return other() if self.won[kind] else plain()

    def _faster(self, device: str, plain: Callable[[], T], other: Callable[[], T]) -> bool:
        try:
            took = self._time(device, other)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a compiler or driver that Triton cannot work with: ATen can
            return False
        return self._time(device, plain) >= GAIN * took

    def _time(self, device: str, way: Callable[[], T]) -> float:
        found = []
        for _ in range(TURNS):
            synchronize(device)
            started = time.perf_counter()
            way()
            synchronize(device)
            found.append(time.perf_counter() - started)
        return min(found)
