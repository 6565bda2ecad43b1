"""int8 times one scale, or one per row; ComfyUI's may be rotated.

With `convrot`, the inputs were multiplied by a Hadamard matrix in groups (comfy-kitchen
`tensor/int8.py`). It is packed with fresh scales: the largest number of a scale becomes 127.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from adaptkit.files.packing import Packed, Packing, largest, slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was

__all__ = ["hadamard", "int8"]

GROUP = 256  # of a rotation, where the description does not say
FLOATS = ("F32", "F16", "BF16")
MOST = 127


def int8(
    weight: TensorInfo,
    scale: TensorInfo,
    parts: Mapping[str, str],
    said: Mapping[str, object],
    unit: float = 1.0,
) -> Packed | None:
    """The weight that these tensors stand for; None if they do not fit.

    `unit` is what the scale counts in: W = q · scale · unit.
    """
    rows, columns = weight.shape
    if weight.dtype != "I8" or scale.dtype not in FLOATS or scale.numel not in (1, rows):
        return None
    group = said.get("convrot_groupsize", GROUP) if said.get("convrot") else 1
    if not isinstance(group, int) or group < 1 or columns % group or not _power_of_four(group):
        return None
    packing = Packing(
        ("weight", "scale"),
        partial(_encode, group=group, unit=unit),
        partial(_allowed, unit=unit),
        None if group == 1 else partial(rotated, group=group),
    )
    numbers = partial(_numbers, group=group, unit=unit)
    return Packed("INT8", weight.shape, parts, numbers, packing)


def _power_of_four(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1


def _steps(stored: Mapping[str, Tensor], unit: float) -> Tensor:
    """The step of every row, or of all (rows or 1, 1)."""
    return stored["scale"].float().reshape(-1, 1) * unit


def _numbers(stored: Mapping[str, Tensor], group: int, unit: float) -> Iterator[Tensor]:
    codes = stored["weight"]
    steps = _steps(stored, unit).expand(len(codes), 1)
    for cut in slices(*codes.shape):
        yield _turned(codes[cut].float().mul_(steps[cut]), group).reshape(-1)


def _allowed(stored: Mapping[str, Tensor], _: Tensor, unit: float) -> Tensor:
    # and what the scale may be too small by, times 127, if it has few bits
    exact = stored["scale"].dtype.itemsize > 2
    return _steps(stored, unit).abs() * (0.5 if exact else 0.5 + MOST * 2.0**-8)


def _encode(
    new: Tensor, old: Was, stored: Mapping[str, Tensor], group: int, unit: float
) -> dict[str, Tensor]:
    import torch

    scale, codes = stored["scale"], torch.empty_like(stored["weight"])
    rows, columns = new.shape
    top = torch.empty(rows)
    for cut in slices(rows, columns):
        top[cut] = largest(_turned(new[cut].float(), group), by_row=True)
    if scale.numel() == 1:
        top = top.max().expand(rows) if rows else top
    fresh = torch.where(top > 0, top / (MOST * unit), torch.ones_like(top)).to(scale.dtype)
    by_row = scale.numel() > 1
    for cut in slices(rows, columns):
        steps = (fresh[cut].float() * unit).unsqueeze(-1)
        turned = _turned(new[cut].float(), group)
        found = (turned / steps).round_().clamp_(-MOST, MOST).to(torch.int8)
        if by_row:
            same = old.same[cut].all(1)
            fresh[cut] = torch.where(same, scale.reshape(-1)[cut], fresh[cut])
            found = torch.where(same.unsqueeze(-1), stored["weight"][cut], found)
        codes[cut] = found
    return {"weight": codes, "scale": (fresh if by_row else fresh[:1]).reshape(scale.shape)}


def rotated(numbers: Tensor, group: int) -> Tensor:
    """Groups of inputs times the Hadamard matrix, which is symmetric and orthogonal."""
    out = numbers.new_empty(numbers.shape)
    for cut in slices(*numbers.shape):
        out[cut] = _turned(numbers[cut], group)
    return out


def _turned(some: Tensor, group: int) -> Tensor:
    """Some rows of numbers, `rotated` unless a group is one number."""
    if group == 1:
        return some
    return (some.reshape(-1, group) @ hadamard(group).to(some.dtype)).reshape(some.shape)


@lru_cache(maxsize=4)
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of four, normed: Kronecker powers of one of 4 × 4."""
    import torch

    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    return found / math.sqrt(size)
