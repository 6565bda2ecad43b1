"""nvfp4: E2M1 numbers, times the e4m3 scale of their block of 16, times one scale.

The first of two numbers is in the higher half of a byte (ComfyUI `comfy/float.py`). A block is
packed as in comfy-kitchen's `quantize_nvfp4`: its scale is max|w| / (6 · the one scale), rounded to
e4m3, and each number the nearest, ties to even. The one scale is kept while it suits all blocks,
and is max|W| / (6 · 448) otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from adaptkit.files.packed.tiles import padded, straight, tiled
from adaptkit.files.packing import Packed, Packing, divided, joined, largest, places, slices, widths

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was

__all__ = ["nvfp4"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 16
MOST = 448.0  # the largest e4m3
# the one scale is kept for numbers as small as this share of those that it was made for: e4m3 has
# too few steps for the scales of much smaller ones
LEAST = 2.0**-4


def nvfp4(
    weight: TensorInfo, scale: TensorInfo, second: TensorInfo | None, parts: Mapping[str, str]
) -> Packed | None:
    """The weight that these tensors stand for; None if they do not fit."""
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    fits = weight.dtype == "U8" and scale.dtype == "F8_E4M3" and columns % BLOCK == 0
    fits = fits and second is not None and second.numel == 1
    if not fits or scale.numel != padded(rows, columns // BLOCK):
        return None
    packing = Packing(("weight", "scale", "second"), _encode, partial(_allowed, columns=columns))
    return Packed("NVFP4", (rows, columns), parts, partial(_numbers, columns=columns), packing)


def _halves(codes: Tensor) -> Tensor:
    """The places (rows, columns) in bytes (rows, columns / 2)."""
    import torch

    return torch.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1)


def _scales(stored: Mapping[str, Tensor], columns: int) -> Tensor:
    """The scale of every block (rows, columns / 16, 1)."""
    scales = straight(stored["scale"].float(), len(stored["weight"]), columns // BLOCK)
    return (scales * stored["second"].float().reshape(())).unsqueeze(-1)


def _table(numbers: tuple[float, ...]) -> Tensor:
    import torch

    return torch.tensor([*numbers, *(-n for n in numbers)])


def _numbers(stored: Mapping[str, Tensor], columns: int) -> Iterator[Tensor]:
    return _each(stored, columns, _table(E2M1))


def _each(stored: Mapping[str, Tensor], columns: int, table: Tensor) -> Iterator[Tensor]:
    """What a table holds for each number, times the scale of its block; some rows at a time."""
    codes, scales = stored["weight"], _scales(stored, columns)
    for cut in slices(len(codes), columns):
        numbers = table[_halves(codes[cut]).int()].reshape(-1, columns // BLOCK, BLOCK)
        yield numbers.mul_(scales[cut]).reshape(-1)


def _allowed(stored: Mapping[str, Tensor], numbers: Tensor, columns: int) -> Tensor:
    each = _each(stored, columns, widths(_table(E2M1)))
    found = joined(each, numbers.numel()).reshape(numbers.shape)
    # scales below the least normal e4m3 are rounded by half of 2^-9
    return found.add_(6 * 2.0**-10 * stored["second"].float().abs().reshape(()))


def _encode(new: Tensor, old: Was, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    rows, columns = new.shape
    second, kept = _second(new, old.largest, stored["second"])
    one = second.float().reshape(())
    codes = torch.empty_like(stored["weight"])
    scales = straight(stored["scale"].float(), rows, columns // BLOCK).clone()
    for cut in slices(rows, columns):
        blocks = new[cut].float().reshape(-1, columns // BLOCK, BLOCK)
        fresh = (blocks.abs().amax(-1) / 6 / one).clamp_(max=MOST).to(torch.float8_e4m3fn).float()
        whole = (fresh * one).unsqueeze(-1)
        scaled = divided(blocks, whole).clamp_(-6.0, 6.0)
        found = places(E2M1, scaled.abs()) | (scaled.signbit().byte() << 3)
        packed = (found[..., 0::2] << 4) | found[..., 1::2]
        if kept:
            same = old.same[cut].reshape(blocks.shape).all(-1)
            fresh = torch.where(same, scales[cut], fresh)
            packed = torch.where(same.unsqueeze(-1), codes_of(stored["weight"][cut]), packed)
        scales[cut] = fresh
        codes[cut] = packed.reshape(-1, columns // 2)
    tiles = tiled(scales.to(torch.float8_e4m3fn).view(torch.uint8), stored["scale"])
    return {"weight": codes, "scale": tiles.view(torch.float8_e4m3fn), "second": second}


def codes_of(stored: Tensor) -> Tensor:
    """Bytes (rows, columns / 2) by blocks (rows, blocks, 8)."""
    return stored.reshape(len(stored), -1, BLOCK // 2)


def _second(new: Tensor, before: float, stored: Tensor) -> tuple[Tensor, bool]:
    """The one scale, and whether it is the stored one. `before` was the largest magnitude."""
    top = largest(new).float()
    most = 6 * MOST * float(stored.float().abs().reshape(()))
    if float(top) == 0.0 or LEAST * before <= float(top) <= most:
        return stored, True
    return (top / (6 * MOST)).to(stored.dtype).reshape(stored.shape), False
