"""Compute precision: what to compute in, exact scaling, honest casts, sums accurate enough to subtract."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import NonFinite
from adaptkit.memory import huge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "accumulate_dtype",
    "cast",
    "compute_dtype",
    "difference",
    "empty",
    "norm_squared",
    "supports_float64",
    "upcast",
]

SCRATCH = 1 << 18  # elements of a scratch block that fits the cache
CHUNK = 1 << 20  # elements widened in one piece: no full-size copy is ever made
RUN = 1024  # elements summed in float32 before float64 takes over
FEW = 16 * RUN  # up to here roundings of single runs show (3e-7 measured), and float64 throughout costs nothing


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype; no copy where it is there already."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def supports_float64(device: torch.device | str) -> bool:
    """Whether the device has float64 at all (Apple's MPS has not)."""
    return torch.device(device).type != "mps"


def accumulate_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float64 if supports_float64(device) else torch.float32


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Stretches, (..., up to CHUNK), of x (..., m, n) read row by row."""
    flat = x.flatten(-2)
    for start in range(0, flat.shape[-1], CHUNK):
        yield flat[..., start : start + CHUNK]


def norm_squared(x: Tensor) -> Tensor:
    """‖x‖_F² over the last two dimensions, (..., m, n) → (...,), in float64 (float32 on MPS).

    Runs of 1024 entries are summed in float32, the runs in float64: measured within 7e-8 of the float64 sum from 17,000
    entries on and 6e-9 at a million, fifteen times faster. Short stretches and tails are summed in float64 throughout.
    Entries of a float32 x below 1e-19 may be lost; above 1e19 the result may be infinite.
    """
    x = x.mT if x.mT.is_contiguous() else x  # read memory in order, without a copy
    wide = accumulate_dtype(x.device)
    total = torch.zeros(x.shape[:-2], dtype=wide, device=x.device)
    for piece in _pieces(x):
        full = piece.shape[-1] // RUN * RUN if piece.shape[-1] > FEW else 0
        if full:
            runs = upcast(piece[..., :full]).reshape(*piece.shape[:-1], -1, RUN)
            total += torch.linalg.vector_norm(runs, dim=-1).to(wide).square().sum(-1)
        total += piece[..., full:].to(wide).square().sum(-1)
    return total


def difference(x: Tensor, y: Tensor) -> Tensor:
    """x − y, (..., m, n), widened before it is subtracted: float32, or float64 where either is.

    Subtracting two bf16 tensors in bf16 changes one entry in nine. y is widened a block of rows at a time into one small
    scratch, which stays in the cache: a quarter of the time of a subtraction of mixed dtypes, and no second full-size copy.
    """
    dtype = compute_dtype(x, y)
    result = empty(x.shape, dtype, x.device)
    step = max(1, SCRATCH // max(1, x.shape[-1]))
    scratch = torch.empty_like(result[..., :step, :])
    for start in range(0, x.shape[-2], step):
        rows = slice(start, start + step)
        part = result[..., rows, :].copy_(x[..., rows, :])
        part.sub_(scratch[..., : part.shape[-2], :].copy_(y[..., rows, :]))
    return result


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, on a CPU in huge pages where it is large."""
    block = huge(math.prod(shape) * dtype.itemsize) if device.type == "cpu" else None
    whole = torch.empty(shape, dtype=dtype, device=device) if block is None else torch.frombuffer(block, dtype=dtype)
    return whole.reshape(shape)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest; NonFinite where a finite number would become infinite (fp16 ends at 65504) or clamped (float8_e4m3)."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.numel() and _narrows(tensor.dtype, dtype):
        _refuse_overflow(upcast(tensor), dtype)
    return tensor.to(dtype)


def _narrows(source: torch.dtype, target: torch.dtype) -> bool:
    return not source.is_floating_point or torch.finfo(target).max < torch.finfo(source).max


def _refuse_overflow(wide: Tensor, dtype: torch.dtype) -> None:
    if not _within(wide, torch.finfo(dtype).max):
        # a NaN or infinity of the input hides an overflow from the extremes: look at each entry
        lost = wide[torch.isfinite(wide) & (wide.abs() >= _overflow(dtype))]
        if lost.numel():
            raise NonFinite(f"{float(lost.abs().max()):.4g} does not fit {str(dtype).removeprefix('torch.')}")


def _within(x: Tensor, bound: float) -> bool:
    """Whether every entry is in [-bound, bound]; False with a NaN. One pass and no copy."""
    low, high = torch.aminmax(x)
    return -bound <= float(low) and float(high) <= bound


def _overflow(dtype: torch.dtype) -> float:
    """The least magnitude that rounds past the largest finite number: half a step beyond it (65520 for fp16).

    Asked of the format, not of the result: torch clamps to float8_e4m3fn's 448 without a word.
    """
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)
