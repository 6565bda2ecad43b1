"""Numbers of block-quantised tensors of GGUF files, and their blocks again.

Numbers come as float32, computed by the `gguf` package, which also packs the types of one scale
and perhaps one minimum for each 32 numbers, as ggml does. K-quants are packed by
adaptkit.files.gguf.kquants. A block of which no number changes keeps its bytes.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.files.gguf import kquants
from adaptkit.files.packing import Packed, Packing, joined, slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was

__all__ = ["WRITTEN", "dequantised", "length", "packed"]


class _Plain(NamedTuple):
    """A type with one scale for 32 numbers: places `low` to `high`, and perhaps a minimum."""

    low: int
    high: int
    minimum: bool = False


PLAIN: Mapping[str, _Plain] = MappingProxyType(
    {
        "Q4_0": _Plain(-8, 7),
        "Q4_1": _Plain(0, 15, minimum=True),
        "Q5_0": _Plain(-16, 15),
        "Q5_1": _Plain(0, 31, minimum=True),
        "Q8_0": _Plain(-127, 127),
    }
)
WRITTEN = (*PLAIN, *kquants.WRITTEN)
# of half precision: the relative error, half its least number, and its least number of all bits
HALF, LEAST, NORMAL = 2.0**-11, 2.0**-25, 2.0**-14


def length(dtype: str) -> int:
    """How many numbers a block holds."""
    return _sizes(dtype)[0]


def _sizes(dtype: str) -> tuple[int, int]:
    """The numbers and the bytes of a block."""
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return numbers, size


def packed(info: TensorInfo) -> Packed:
    """A quantised tensor; without a packing if its type is only read."""
    packing = None
    if info.dtype in WRITTEN:
        packing = Packing(
            ("weight",), partial(_encode, dtype=info.dtype), partial(_allowed, dtype=info.dtype)
        )
    decode = partial(_numbers, dtype=info.dtype)
    return Packed(info.dtype, info.shape, {"weight": info.name}, decode, packing)


def _numbers(stored: Mapping[str, Tensor], dtype: str) -> Iterator[Tensor]:
    return _pieces(stored["weight"], dtype)


def dequantised(raw: Tensor, dtype: str) -> Tensor:
    """The numbers of blocks (bytes), float32, as a vector."""
    numbers, size = _sizes(dtype)
    return joined(_pieces(raw, dtype), raw.numel() // size * numbers)


def _pieces(raw: Tensor, dtype: str) -> Iterator[Tensor]:
    import gguf
    import torch
    from gguf import quants

    numbers, size = _sizes(dtype)
    blocks = raw.reshape(-1, size).numpy()
    for cut in slices(len(blocks), numbers):
        # as one row: the package works on sixteen rows at a time
        found = quants.dequantize(blocks[cut].reshape(1, -1), gguf.GGMLQuantizationType[dtype])
        yield torch.from_numpy(found).reshape(-1)


def _encode(new: Tensor, old: Was, stored: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    import torch

    numbers, size = _sizes(dtype)
    blocks, same = new.reshape(-1, numbers), old.same.reshape(-1, numbers)
    out = stored["weight"].reshape(-1, size).clone()
    for cut in slices(len(blocks), numbers):
        changed = ~same[cut].all(-1)
        if bool(changed.any()):
            wide = blocks[cut][changed].float()
            made = kquants.encode(wide, dtype) if dtype in kquants.WRITTEN else _plain(wide, dtype)
            out[cut] = out[cut].masked_scatter(changed.unsqueeze(-1), made)
    return {"weight": out.reshape(stored["weight"].shape).to(torch.uint8)}


def _plain(blocks: Tensor, dtype: str) -> Tensor:
    import gguf
    import numpy as np
    import torch
    from gguf import quants

    with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond half precision is infinite
        made = quants.quantize(blocks.numpy().reshape(1, -1), gguf.GGMLQuantizationType[dtype])
    return torch.from_numpy(made.reshape(len(blocks), -1))


def _allowed(stored: Mapping[str, Tensor], numbers: Tensor, dtype: str) -> Tensor:
    """Half a step, and the rounding of scales; at the ends of a block what they cut off."""
    import torch

    width, size = _sizes(dtype)
    raw, found = stored["weight"].reshape(-1, size), numbers.reshape(-1, width)
    out = torch.empty(found.shape)
    for cut in slices(len(raw), width):
        if dtype in kquants.WRITTEN:
            out[cut] = kquants.allowed(raw[cut], found[cut], dtype)
            continue
        form = PLAIN[dtype]
        halves = raw[cut, : 2 * (1 + form.minimum)].clone().view(torch.float16).float()
        step = halves[:, :1]
        least = halves[:, 1:].abs().amax(1, keepdim=True) if form.minimum else 0.0
        most = max(abs(form.low), form.high)
        # Q4_0 and Q5_0 map the largest magnitude to their low end: the other sign lacks a step
        end = (found[cut] - step * form.high).abs() <= step.abs() * 0.25
        share = torch.where(end & (form.low == -form.high - 1), 1.0, 0.5)
        rounding = most * (step.abs() * HALF + (step.abs() < NORMAL) * LEAST)
        out[cut] = share * step.abs() + rounding + (least * HALF + LEAST if form.minimum else 0.0)
    return out.reshape(numbers.shape)
