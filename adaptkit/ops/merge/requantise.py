"""Decoding and encoding of scaled fp8 weights and of packed ones, with new scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from adaptkit.files.dtypes.widening import widen
from adaptkit.files.packing import Was, largest
from adaptkit.ops.merge.steps import BLOCK, square
from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from adaptkit.files.packing import Packed
    from adaptkit.files.source import TensorSource
    from adaptkit.ops.merge.plan import TensorMerge

__all__ = ["Numbers", "quantised", "repacked", "requantised", "type_name", "widened"]


class Numbers(NamedTuple):
    """What a tensor (*shape) stands for, a block at a time: it is never decoded as a whole.

    Its scale, if it has one, holds a number for each of its groups of consecutive entries.
    """

    stored: Tensor
    scale: Tensor | None = None

    @property
    def group(self) -> int:
        """Entries of a group."""
        return self.stored.numel() // (1 if self.scale is None else self.scale.numel())

    def places(self) -> Iterator[slice]:
        """Blocks of the flattened tensor: some groups, or a part of one."""
        count, size = self.stored.numel(), self.group
        step = BLOCK if size > BLOCK else max(1, BLOCK // max(1, size)) * size
        for first in range(0, count, max(size, step, 1)):
            last = min(count, first + max(size, step))
            for start in range(first, last, step):
                yield slice(start, min(last, start + step))

    def at(self, place: slice, dtype: torch.dtype) -> Tensor:
        """The numbers of a block (k), decoded in this dtype."""
        part = widen(self.stored.reshape(-1)[place], dtype)
        if self.scale is None:
            return part
        return (part.view(len(self.scales(place)), -1) * self.scales(place).to(dtype)).view(-1)

    def scales(self, place: slice) -> Tensor:
        """The scale of each group of a block (g, 1)."""
        assert self.scale is not None
        first, last = place.start // self.group, -(-place.stop // self.group)
        return self.scale.reshape(-1, 1)[first:last]


def widened(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Decode a batch of weights (b, *shape) with scales (b, *scale) to float32 or float64."""
    import torch

    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    wide = stored.clone() if stored.dtype == dtype else widen(stored, dtype)
    if scale is not None:
        _grouped(wide, scale).mul_(_column(scale).to(wide.dtype))
    return wide


class Repacked(NamedTuple):
    """The tensors of a packed weight by name, and ‖W‖², ‖ΔW‖² and ‖rounding‖²."""

    written: dict[str, Tensor]
    weight: float
    delta: float
    rounding: float


def repacked(source: TensorSource, packed: Packed, merged: Tensor) -> Repacked:
    """Pack merged numbers (*shape). What did not change keeps its bytes.

    The numbers before and after are decoded in pieces: no second weight is ever in memory.
    """
    import torch

    assert packed.packing is not None
    stored, merged = source.parts(packed), merged.cpu()
    same = torch.empty(merged.shape, dtype=torch.bool)
    weight = delta = rounding = most = 0.0
    for new, old, alike in _beside(merged, packed.numbers(stored), same):
        torch.eq(new, old, out=alike)
        weight, delta = weight + square(old), delta + square(new - old)
        most = max(most, float(largest(old)))
    fresh = {part: stored[part] for part in packed.packing.parts}
    if not bool(same.all()):
        fresh = packed.packing.encode(merged, Was(same, most), stored)
        for new, after, _ in _beside(merged, packed.numbers(stored | fresh), same):
            rounding += square(after - new)
    written = {packed.parts[part]: tensor for part, tensor in fresh.items()}
    return Repacked(written, weight, delta, rounding)


def _beside(
    merged: Tensor, pieces: Iterator[Tensor], same: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each flat piece of the numbers of a tensor, between the same parts of two others."""
    flat, other, start = merged.reshape(-1), same.reshape(-1), 0
    for piece in pieces:
        stop = start + piece.numel()
        yield flat[start:stop], piece.reshape(-1), other[start:stop]
        start = stop


def requantised(
    merge: TensorMerge, merged: Tensor, before: Numbers
) -> tuple[dict[str, Tensor], Numbers]:
    """Encode a scaled weight as `quantised` does, unless no number of it has changed.

    Return the tensors to write by name, and the numbers that they stand for.
    """
    import torch

    assert merge.scale is not None
    assert before.scale is not None
    flat, after = merged.reshape(-1), before
    blocks = (torch.equal(flat[at], before.at(at, flat.dtype)) for at in before.places())
    if not all(blocks):
        after = Numbers(*quantised(merged, before.scale, merge.dtype))
    assert after.scale is not None
    return {merge.name: after.stored, merge.scale: after.scale}, after


def quantised(wide: Tensor, scale: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Encode one weight (*shape); return it with a new scale of the given shape and dtype.

    Each scale maps the largest magnitude in its group to the end of the format, as ComfyUI and
    musubi-tuner do. It is rounded to its dtype before use, so that decoding is exact. A
    scale of wider formats is kept.
    """
    import torch

    target = torch_dtype(dtype)
    ends = torch.finfo(target).max
    if target.itemsize > 1:
        fresh = scale
    else:
        low, high = torch.aminmax(_grouped(wide.unsqueeze(0), scale.unsqueeze(0))[0], dim=-1)
        largest = torch.maximum(-low, high)
        fresh = torch.where(largest > 0, largest / ends, torch.ones_like(largest)).to(scale.dtype)
        fresh = fresh.reshape(scale.shape)
    found = Numbers(torch.empty_like(wide, dtype=target), fresh)
    flat, out = wide.reshape(-1), found.stored.view(-1)
    for place in found.places():
        scales = found.scales(place)
        divided = flat[place].view(len(scales), -1) / scales.to(flat.dtype)
        # a scale that was rounded down leaves the largest magnitude beyond the end
        out[place].copy_(divided.clamp_(-ends, ends).view(-1))
    return found.stored, fresh


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
