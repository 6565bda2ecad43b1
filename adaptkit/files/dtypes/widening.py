"""8-bit floats in a wider dtype, looked up in a table of all of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["widen"]

CHUNK = 1 << 17  # numbers at a time, whose places stay in the cache


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (any shape) in a wider dtype, as `x.to(dtype)` gives it, bit for bit.

    On a CPU, torch 2.13 takes 4.5 ns for a number of float8_e4m3fn and 1.1 for one of float8_e5m2.
    A table takes 0.5 (one core of an AMD EPYC).
    """
    import torch

    small = x.is_floating_point() and x.itemsize == 1
    if not small or x.device.type != "cpu" or not x.is_contiguous():
        return x.to(dtype)
    found = torch.empty(x.shape, dtype=dtype)
    table, flat, codes = _table(x.dtype, dtype), found.view(-1), x.view(torch.uint8).view(-1)
    for start in range(0, len(codes), CHUNK):
        part = slice(start, start + CHUNK)
        torch.index_select(table, 0, codes[part].int(), out=flat[part])
    return found


@cache
def _table(small: torch.dtype, wide: torch.dtype) -> Tensor:
    import torch

    with torch.inference_mode(False):  # for every later caller, whatever this one does
        return torch.arange(256, dtype=torch.uint8).view(small).to(wide)
