"""mxfp8: e4m3 numbers times 2^(e - 127), e of each block of 32 (OCP Microscaling Formats 1.0).

A block is packed as in comfy-kitchen's `quantize_mxfp8`: e is the least whose numbers all fit, and
0 of a block of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packed.tiles import padded, straight, tiled
from adaptkit.files.packing import Packed, Packing, slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was

__all__ = ["mxfp8"]

BLOCK, BIAS, MOST = 32, 127, 448.0


def mxfp8(weight: TensorInfo, scale: TensorInfo, parts: Mapping[str, str]) -> Packed | None:
    """The weight that these tensors stand for; None if they do not fit."""
    rows, columns = weight.shape
    fits = weight.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0") and columns % BLOCK == 0
    if not fits or scale.numel != padded(rows, columns // BLOCK):
        return None
    packing = Packing(("weight", "scale"), _encode, _allowed)
    return Packed("MXFP8", weight.shape, parts, _numbers, packing)


def _scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The scale of every block (rows, blocks, 1)."""
    import torch

    rows, columns = stored["weight"].shape
    exponents = straight(stored["scale"].view(torch.uint8), rows, columns // BLOCK)
    return _power(exponents).unsqueeze(-1)


def _power(exponents: Tensor) -> Tensor:
    import torch

    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - BIAS)


def _numbers(stored: Mapping[str, Tensor]) -> Iterator[Tensor]:
    numbers, scales = stored["weight"], _scales(stored)
    rows, columns = numbers.shape
    for cut in slices(rows, columns):
        blocks = numbers[cut].float().reshape(-1, columns // BLOCK, BLOCK)
        yield blocks.mul_(scales[cut]).reshape(-1)


def _allowed(stored: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
    import torch

    # half a step: 2^-4 of a number, and half the least subnormal, 2^-9
    least = (_scales(stored) * 2.0**-10).expand(-1, -1, BLOCK).reshape(numbers.shape)
    return torch.maximum(numbers.abs() * 2.0**-4, least)


def _encode(new: Tensor, old: Was, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    rows, columns = new.shape
    numbers = torch.empty_like(stored["weight"])
    before = straight(stored["scale"].view(torch.uint8), rows, columns // BLOCK)
    exponents = torch.empty_like(before)
    for cut in slices(rows, columns):
        blocks = new[cut].float().reshape(-1, columns // BLOCK, BLOCK)
        top = blocks.abs().amax(-1)
        fraction, power = torch.frexp(top / MOST)
        power = power - (fraction == 0.5).int()  # the exponent of the next power of two
        fresh = torch.where(top > 0, (power + BIAS).clamp(0, 254), 0).byte()
        # what does not fit the least scale is near enough to zero
        divided = (blocks / _power(fresh).unsqueeze(-1)).clamp_(-MOST, MOST)
        found = divided.to(torch.float8_e4m3fn)
        same = old.same[cut].reshape(blocks.shape).all(-1)
        exponents[cut] = torch.where(same, before[cut], fresh)
        kept = numbers_of(stored["weight"][cut])
        # no `where` of 8-bit floats
        bits = torch.where(same.unsqueeze(-1), kept, found.view(torch.uint8))
        numbers[cut] = bits.reshape(-1, columns).view(torch.float8_e4m3fn)
    tiles = tiled(exponents, stored["scale"])
    return {"weight": numbers, "scale": tiles.view(stored["scale"].dtype)}


def numbers_of(stored: Tensor) -> Tensor:
    """The bytes of numbers (rows, columns) by blocks."""
    import torch

    return stored.view(torch.uint8).reshape(len(stored), -1, BLOCK)
