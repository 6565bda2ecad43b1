"""Compute precision: what to compute in, exact scaling, honest casts, sums accurate enough to subtract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import NonFinite

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["accumulate_dtype", "cast", "compute_dtype", "dot", "norm_squared", "supports_float64", "upcast"]

CHUNK = 1 << 20  # elements summed in one piece: 8 MB in float64, and no full-size copy


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype; no copy where it is there already."""
    return tensor.to(compute_dtype(tensor))


def supports_float64(device: torch.device | str) -> bool:
    """Whether the device has float64 at all (Apple's MPS has not)."""
    return torch.device(device).type != "mps"


def accumulate_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float64 if supports_float64(device) else torch.float32


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching blocks of rows of (..., m, n) tensors, each of about CHUNK elements per batch member."""
    m, n = tensors[0].shape[-2:]
    step = max(1, CHUNK // max(1, n))
    for start in range(0, m, step):
        yield tuple(t[..., start : start + step, :] for t in tensors)


def norm_squared(x: Tensor) -> Tensor:
    """‖x‖_F² over the last two dimensions, (..., m, n) → (...,), summed in float64 (float32 on MPS).

    Rows are widened a block at a time: exact to about 1e-15 relative, without a float64 copy of x.
    """
    wide = accumulate_dtype(x.device)
    total = torch.zeros(x.shape[:-2], dtype=wide, device=x.device)
    for (block,) in _rows(x):
        total += torch.linalg.vector_norm(block, dim=(-2, -1), dtype=wide).square()
    return total


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ over the last two dimensions, (..., m, n) → (...,), as `norm_squared` sums."""
    wide = accumulate_dtype(x.device)
    total = torch.zeros(x.shape[:-2], dtype=wide, device=x.device)
    for one, two in _rows(x, y):
        total += (one.to(wide) * two.to(wide)).sum(dim=(-2, -1))
    return total


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest; NonFinite where a finite number would become infinite (fp16 ends at 65504)."""
    if tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    if tensor.numel() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        largest = tensor.abs().max()
        if bool(torch.isfinite(largest)) and not bool(torch.isfinite(rounded.abs().max())):
            raise NonFinite(f"{float(largest):.4g} does not fit {str(dtype).removeprefix('torch.')}")
    return rounded
