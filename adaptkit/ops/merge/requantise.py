"""Decoding and encoding of scaled fp8 weights and of packed ones, with new scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.files.packing import Packed
    from adaptkit.files.source import TensorSource
    from adaptkit.ops.merge.plan import TensorMerge

__all__ = ["quantised", "repacked", "requantised", "type_name", "widened"]


def widened(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Decode a batch of weights (b, *shape) with scales (b, *scale) to float32 or float64."""
    import torch

    wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32, copy=True)
    if scale is not None:
        _grouped(wide, scale).mul_(_column(scale).to(wide.dtype))
    return wide


def repacked(
    source: TensorSource, packed: Packed, merged: Tensor, before: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a packed weight by name, and the numbers that they stand for.

    `before` are the numbers that it stood for. What did not change keeps its bytes.
    """
    import torch

    assert packed.packing is not None
    stored = source.parts(packed)
    if torch.equal(merged, before):
        fresh, back = {part: stored[part] for part in packed.packing.parts}, before
    else:
        fresh = packed.packing.encode(merged.cpu(), before.cpu(), stored)
        back = packed.decode(stored | fresh).reshape(merged.shape).to(merged.device)
    return {packed.parts[part]: tensor for part, tensor in fresh.items()}, back


def requantised(
    merge: TensorMerge, merged: Tensor, before: Tensor, stored: Tensor, scale: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode a scaled weight as `quantised` does, unless no number of it has changed.

    Returns what `repacked` does.
    """
    import torch

    assert merge.scale is not None
    if torch.equal(merged, before):
        return {merge.name: stored, merge.scale: scale}, before
    rounded, fresh = quantised(merged, scale, merge.dtype)
    decoded = widened(rounded.unsqueeze(0), fresh.unsqueeze(0))[0]
    return {merge.name: rounded, merge.scale: fresh}, decoded


def quantised(wide: Tensor, scale: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Encode one weight (*shape); return it with a new scale of the given shape and dtype.

    Each scale maps the largest magnitude in its group to the end of the format, as ComfyUI and
    musubi-tuner do. It is rounded to its dtype before use, so that decoding is exact. A
    scale of wider formats is kept.
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
    # a scale that was rounded down leaves the largest magnitude beyond the end
    divided.clamp_(-ends, ends)
    return divided.to(target).reshape(wide.shape), fresh.reshape(scale.shape)


def _grouped(wide: Tensor, scale: Tensor) -> Tensor:
    """View (b, *shape) as (b, groups, entries), one group per scale."""
    return wide.view(len(wide), scale[0].numel(), -1)


def _column(scale: Tensor) -> Tensor:
    """View (b, *scale) as (b, groups, 1).

    A scale is one number, one per row, (m) or (m, 1), or one per part of a row, (m, k, 1).
    """
    return scale.reshape(len(scale), -1, 1)


def type_name(merge: TensorMerge) -> str:
    """The type that a tensor is written in, as torch names it or its format does."""
    return merge.dtype if merge.packed else str(torch_dtype(merge.dtype)).removeprefix("torch.")
