"""Scaled fp8 weights, there and back: every scale is made anew for the weight that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantised", "widened"]


def widened(stored: Tensor, scale: Tensor | None) -> Tensor:
    """A batch of weights (b, *shape) as the numbers they mean, float32 (float64 stays): times their scales (b, *scale)."""
    import torch

    wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32, copy=True)
    if scale is not None:
        _grouped(wide, scale).mul_(_column(scale).to(wide.dtype))
    return wide


def quantised(wide: Tensor, scale: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """(weight, scale) of one weight (*shape), the scale in the shape and dtype of the one it had.

    Each scale puts the largest magnitude of what it scales at the end of the format, as ComfyUI's and musubi-tuner's do;
    it is rounded to its dtype before it is used, so that reading gives exactly what was meant. A scale of numbers that are
    no fp8 stays.
    """
    import torch

    groups = _grouped(wide.unsqueeze(0), scale.unsqueeze(0))
    target = torch_dtype(dtype)
    ends = torch.finfo(target).max
    largest = groups.abs().amax(dim=-1, keepdim=True)
    fresh = torch.where(largest > 0, largest / ends, torch.ones_like(largest)).to(scale.dtype)
    if target.itemsize > 1:
        fresh = scale.reshape(fresh.shape)
    divided = groups / fresh.to(groups.dtype)
    # a scale that was rounded down leaves the largest a little beyond the end
    return divided.clamp_(-ends, ends).to(target).reshape(wide.shape), fresh.reshape(scale.shape)


def _grouped(wide: Tensor, scale: Tensor) -> Tensor:
    """A view of (b, *shape) as (b, groups, entries): what one scale belongs to stands in one group."""
    return wide.view(len(wide), scale[0].numel(), -1)


def _column(scale: Tensor) -> Tensor:
    """(b, *scale) as (b, groups, 1). One number, one per row (m) or (m, 1), one per stretch of a row (m, k, 1): in order."""
    return scale.reshape(len(scale), -1, 1)
