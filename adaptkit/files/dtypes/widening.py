"""8-bit floats in a wider dtype, some of them looked up in a table of all numbers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["widen"]

SLOW = ("torch.float8_e4m3fn", "torch.float8_e4m3fnuz", "torch.float8_e5m2fnuz")
CHUNK = 1 << 17  # numbers at a time, whose places stay in the cache


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (any shape) in a wider dtype, as `x.to(dtype)` gives it, bit for bit.

    On a CPU, torch 2.13 takes 3.0 ns for a number of float8_e4m3fn, and the table 0.8 (one core of
    an AMD EPYC). float8_e5m2 and float8_e8m0fnu are quick without.
    """
    import torch

    if str(x.dtype) not in SLOW or x.device.type != "cpu" or not x.is_contiguous():
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
