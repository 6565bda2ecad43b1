"""nvfp4, mxfp8 and int8 of ComfyUI, which a `comfy_quant` tensor beside the weight names.

Without that name they are not read: other programs store the halves of a byte, and the scales of
blocks, in another order under the same keys.

nvfp4: E2M1 numbers, the first in the higher half of a byte, times the block's e4m3 scale (16
numbers), times one scale (ComfyUI `comfy/float.py`). mxfp8: e4m3 numbers times 2^(e − 127), e of
each block of 32. Both lay the scales out in tiles of 128 rows and 4 columns (NVIDIA cuBLAS, "1D
block scaling factors layout"). int8: times one scale, or one per row; with `convrot`, the inputs
were multiplied by a Hadamard matrix in groups (comfy-kitchen `tensor/int8.py`).
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from adaptkit.files.packed.contract import Packed, described

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource

__all__ = ["find"]

NAME = ".comfy_quant"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 256  # of a rotation, where the description does not say
FLOATS = ("F32", "F16", "BF16")
# what a description may say without meaning other numbers
HARMLESS = frozenset(
    {
        "format", "convrot", "convrot_groupsize", "per_row", "orig_dtype", "orig_shape",
        "full_precision_matrix_mult",
    }
)  # fmt: skip
# beside a weight, and of no meaning to it: the scale of activations
BESIDE = ("input_scale", "scale_input")


def find(source: TensorSource) -> dict[str, Packed]:
    """The packed weights of a file, by name; those that are described wrongly are left out."""
    found: dict[str, Packed] = {}
    for key in source.infos:
        if key.endswith(NAME) and f"{key.removesuffix(NAME)}.weight" in source.infos:
            one = _one(source, key)
            if one is not None:
                found[one.parts["weight"]] = one
    return found


def _one(source: TensorSource, key: str) -> Packed | None:
    module, infos = key.removesuffix(NAME), source.infos
    said = described(source, key)
    names = {"weight": "weight", "scale": "weight_scale", "second": "weight_scale_2"}
    parts = {
        part: f"{module}.{name}" for part, name in names.items() if f"{module}.{name}" in infos
    }
    weight, scale = infos[parts["weight"]], infos.get(parts.get("scale", ""))
    if scale is None or len(weight.shape) != 2 or not said.keys() <= HARMLESS:
        return None
    parts |= {name: f"{module}.{name}" for name in BESIDE if f"{module}.{name}" in infos}
    parts["name"] = key
    match said.get("format"):
        case "nvfp4":
            return _nvfp4(weight, scale, infos.get(parts.get("second", "")), parts)
        case "mxfp8":
            return _mxfp8(weight, scale, parts)
        case "int8_tensorwise":
            return _int8(weight, scale, parts, said)
    return None


def _nvfp4(
    weight: TensorInfo, scale: TensorInfo, second: TensorInfo | None, parts: Mapping[str, str]
) -> Packed | None:
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    fits = weight.dtype == "U8" and scale.dtype == "F8_E4M3" and columns % 16 == 0
    fits = fits and second is not None and second.numel == 1
    if not fits or scale.numel != _padded(rows, columns // 16):
        return None
    return Packed("NVFP4", (rows, columns), parts, partial(_decode_nvfp4, columns=columns))


def _decode_nvfp4(stored: Mapping[str, Tensor], columns: int) -> Tensor:
    import torch

    codes = stored["weight"]
    halves = torch.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1)
    numbers = torch.tensor([*E2M1, *(-n for n in E2M1)])[halves.int()]
    scales = straight(stored["scale"].float(), len(codes), columns // 16)
    scales = scales * stored["second"].float().reshape(())
    return (numbers.reshape(len(codes), -1, 16) * scales.unsqueeze(-1)).reshape(len(codes), columns)


def _mxfp8(weight: TensorInfo, scale: TensorInfo, parts: Mapping[str, str]) -> Packed | None:
    rows, columns = weight.shape
    fits = weight.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0") and columns % 32 == 0
    if not fits or scale.numel != _padded(rows, columns // 32):
        return None
    return Packed("MXFP8", weight.shape, parts, _decode_mxfp8)


def _decode_mxfp8(stored: Mapping[str, Tensor]) -> Tensor:
    import torch

    rows, columns = stored["weight"].shape
    exponents = straight(stored["scale"].view(torch.uint8), rows, columns // 32)
    scales = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    blocks = stored["weight"].float().reshape(rows, -1, 32)
    return (blocks * scales.unsqueeze(-1)).reshape(rows, columns)


def _padded(rows: int, columns: int) -> int:
    """How many scales the tiles hold: 128 rows and 4 columns each."""
    return -(-rows // 128) * 128 * -(-columns // 4) * 4


def straight(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) out of their tiles.

    In a tile, scale (r, c) is at 16 (r mod 32) + 4 ⌊r / 32⌋ + c; tiles follow each other by rows.
    """
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiles = tiled.reshape(tall, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall * 128, wide * 4)[:rows, :columns]


def _int8(
    weight: TensorInfo, scale: TensorInfo, parts: Mapping[str, str], said: Mapping[str, object]
) -> Packed | None:
    rows, columns = weight.shape
    if weight.dtype != "I8" or scale.dtype not in FLOATS or scale.numel not in (1, rows):
        return None
    group = said.get("convrot_groupsize", GROUP) if said.get("convrot") else 1
    if not isinstance(group, int) or group < 1 or columns % group or not _power_of_four(group):
        return None
    return Packed("INT8", weight.shape, parts, partial(_decode_int8, group=group), group == 1)


def _power_of_four(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1


def _decode_int8(stored: Mapping[str, Tensor], group: int) -> Tensor:
    numbers = stored["weight"].float() * stored["scale"].float().reshape(-1, 1)
    if group == 1:
        return numbers
    # the matrix is symmetric and orthogonal: it undoes itself
    cut = numbers.reshape(len(numbers), -1, group)
    return (cut @ hadamard(group)).reshape(numbers.shape)


@lru_cache(maxsize=4)
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of four, normed: Kronecker powers of one of 4 × 4."""
    import torch

    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    return found / math.sqrt(size)
