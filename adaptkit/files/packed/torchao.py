"""int8, int4 and float8 weights of torchao, as diffusers and transformers save them.

A tensor subclass is stored as its parts (`torchao.prototype.safetensors`): `x._weight_qdata`,
`x._weight_scale` … of the weight `x.weight`, whose class and block sizes are JSON in the metadata.
Int8Tensor and IntxUnpackedToInt8Tensor: W = (q - zero point) · scale by blocks; Float8Tensor:
W = q · scale; Int4Tensor (fbgemm `int4_row_quantize_zp`, `pack_int4`): W = q · scale + zero point,
q from -8 to 7, the first of two in the lower half of a byte, scales (groups, rows). Int8Tensor and
Float8Tensor are packed with fresh scales, whose largest number becomes the end of the format. Its
other classes hold the tiles of a kernel, and are told by name.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError
from adaptkit.files.limits import read_json
from adaptkit.files.packing import Packed, Packing, slices, unread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was
    from adaptkit.files.source import TensorSource

__all__ = ["find"]

NAMES = "tensor_names"
FLOATS = ("F32", "F16", "BF16")
# parts that are of no meaning to a weight: the scales of activations
BESIDE = ("act_scale", "act_quant_scale", "act_zero_point")
# classes that are only told by name
UNREAD = {
    "Int4TilePackedTo4dTensor": "TORCHAO_INT4_TILES",
    "Int4PlainInt32Tensor": "TORCHAO_INT4_INT32",
    "Int4OpaqueTensor": "TORCHAO_INT4_OPAQUE",
    "MXTensor": "TORCHAO_MX",
    "NVFP4Tensor": "TORCHAO_NVFP4",
}


def find(source: TensorSource) -> dict[str, Packed]:
    """The packed weights of a file, by name."""
    if NAMES not in source.metadata:
        return {}
    found: dict[str, Packed] = {}
    parts = _parts(source)
    for name, held in parts.items():
        said = _json(source.metadata.get(name))
        if "qdata" in held and isinstance(said, dict):
            found[name] = _one(source, said, held)
    return found


def _json(text: str | None) -> Any:
    try:
        return None if text is None else read_json(text.encode("utf-8"), "torchao")
    except (AdaptkitError, ValueError):
        return None


def _parts(source: TensorSource) -> dict[str, dict[str, str]]:
    """The keys of each weight's parts: `x._weight_qdata` is `qdata` of `x.weight`."""
    found: dict[str, dict[str, str]] = {}
    for key in source.infos:
        module, dot, last = key.rpartition(".")
        if dot and last.startswith("_weight_"):
            found.setdefault(f"{module}.weight", {})[last.removeprefix("_weight_")] = key
    return found


def _one(source: TensorSource, said: Mapping[str, Any], held: Mapping[str, str]) -> Packed:
    kind, data = said.get("_type"), said.get("_data")
    data = data if isinstance(data, dict) else {}
    parts = {"weight" if part == "qdata" else part: key for part, key in held.items()}
    infos = {part: source.infos[key] for part, key in parts.items() if part not in BESIDE}
    made = None
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"):
        # the range of the integers of the second is that of another type
        made = _plain(infos, parts, again=kind != "IntxUnpackedToInt8Tensor")
    elif kind == "Int4Tensor":
        made = _int4(infos, parts)
    if made is not None:
        return made
    shape = data.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        shape = infos["weight"].shape
    return unread(UNREAD.get(str(kind), "TORCHAO"), tuple(shape), parts)


def _plain(
    infos: Mapping[str, TensorInfo], parts: Mapping[str, str], *, again: bool
) -> Packed | None:
    """Numbers (rows, columns) times scales of blocks of equal size."""
    weight, scale = infos["weight"], infos.get("scale")
    zero = infos.get("zero_point")
    if not infos.keys() <= {"weight", "scale", "zero_point"} or scale is None:
        return None
    integer = weight.dtype == "I8"
    if not integer and weight.dtype not in ("F8_E4M3", "F8_E5M2"):
        return None
    if scale.dtype not in FLOATS or _grid(weight.shape, scale.shape) is None:
        return None
    if zero is not None and (not integer or zero.numel != scale.numel):
        return None
    packing = Packing(("weight", "scale"), _encode_plain, _allowed_plain) if again else None
    return Packed("INT8" if integer else "FP8", weight.shape, parts, _numbers_plain, packing)


def _grid(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """How many blocks a matrix has below and beside each other; None if they do not divide it."""
    if len(weight) != 2 or 0 in weight:
        return None
    if math.prod(scale) == 1:
        return 1, 1
    if len(scale) == 1:
        scale = (*scale, 1)
    if len(scale) != 2 or any(not n or m % n for m, n in zip(weight, scale, strict=True)):
        return None
    return scale[0], scale[1]


def _blocks(numbers: Tensor, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (down, rows, across, columns) by blocks, with their scales and zero points."""
    import torch

    rows, columns = numbers.shape
    grid = _grid((rows, columns), tuple(stored["scale"].shape))
    assert grid is not None
    down, across = grid
    blocks = numbers.reshape(down, rows // down, across, columns // across)
    scale = stored["scale"].float().reshape(down, 1, across, 1)
    zero = stored.get("zero_point")
    zeros = torch.zeros_like(scale) if zero is None else zero.float().reshape(scale.shape)
    return blocks, scale, zeros


def _cuts(stored: Mapping[str, Tensor], *each: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows at a time, and of each number per block (down, 1, across, 1) that of every row.

    The latter as (rows, across, 1), beside numbers (rows, across, columns).
    """
    import torch

    rows, columns = stored["weight"].shape
    for cut in slices(rows, columns):
        down = torch.arange(cut.start, cut.stop) // (rows // len(each[0]))
        yield cut, [one[down].reshape(len(down), -1, 1) for one in each]


def _numbers_plain(stored: Mapping[str, Tensor]) -> Iterator[Tensor]:
    codes = stored["weight"]
    _, *both = _blocks(codes, stored)
    for cut, (scale, zero) in _cuts(stored, *both):
        some = codes[cut].float().reshape(len(scale), scale.shape[1], -1)
        yield some.sub_(zero).mul_(scale).reshape(-1)


def _encode_plain(new: Tensor, old: Was, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    codes, form = stored["weight"].view(torch.uint8), stored["weight"].dtype
    blocks, scale, zero = _blocks(new.float(), stored)
    integer = not form.is_floating_point
    most = 127.0 if integer else torch.finfo(form).max
    low, high = (extreme(blocks, dim=(1, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    top = torch.maximum(low.abs(), high.abs())
    fresh = torch.where(top > 0, top / (most - zero.abs()), torch.ones_like(top))
    same = _blocks(old.same, stored)[0].all(3, keepdim=True).all(1, keepdim=True)
    fresh = torch.where(same, scale, fresh.to(stored["scale"].dtype).float())
    weight = torch.empty_like(codes)
    for cut, (step, offset, kept) in _cuts(stored, fresh, zero, same):
        found = new[cut].float().reshape(len(step), step.shape[1], -1) / step
        if integer:
            found = found.round_().add_(offset).clamp_(-127, 127)
        bits = found.clamp_(-most, most).to(form).view(torch.uint8)
        before = codes[cut].reshape(bits.shape)
        weight[cut] = torch.where(kept, before, bits).reshape(len(step), -1)
    scales = fresh.reshape(stored["scale"].shape).to(stored["scale"].dtype)
    return {"weight": weight.view(form), "scale": scales}


def _allowed_plain(stored: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
    import torch

    blocks, scale, _ = _blocks(numbers.abs(), stored)
    form, coarse = stored["weight"].dtype, stored["scale"].dtype.itemsize == 2
    if not form.is_floating_point:
        # a scale of few bits may be too small for the largest number
        return (scale.abs() * (1.0 if coarse else 0.5)).expand_as(blocks).reshape(numbers.shape)
    info = torch.finfo(form)
    least = scale.abs() * info.smallest_normal * info.eps / 2
    return torch.maximum(blocks * (info.eps / 2), least).reshape(numbers.shape)


def _int4(infos: Mapping[str, TensorInfo], parts: Mapping[str, str]) -> Packed | None:
    weight, scale, zero = infos["weight"], infos.get("scale"), infos.get("zero_point")
    if infos.keys() != {"weight", "scale", "zero_point"} or scale is None or zero is None:
        return None
    if weight.dtype not in ("I8", "U8") or len(weight.shape) != 2 or len(scale.shape) != 2:
        return None
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    groups = scale.shape[0]
    fits = scale.shape[1] == rows and scale.shape == zero.shape and groups
    if not fits or columns % groups or not {scale.dtype, zero.dtype} <= set(FLOATS):
        return None
    numbers = partial(_numbers_int4, columns=columns)
    return Packed("INT4", (rows, columns), parts, numbers, by_pieces=False)


def _numbers_int4(stored: Mapping[str, Tensor], columns: int) -> Iterator[Tensor]:
    yield _decode_int4(stored, columns)


def _decode_int4(stored: Mapping[str, Tensor], columns: int) -> Tensor:
    import torch

    bytes_ = stored["weight"].view(torch.uint8)
    halves = torch.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(len(bytes_), columns)
    numbers = (halves ^ 8).float().sub_(8)  # of two's complement
    scale, zero = (stored[part].float().T.unsqueeze(-1) for part in ("scale", "zero_point"))
    blocks = numbers.reshape(len(bytes_), scale.shape[1], -1)
    return blocks.mul_(scale).add_(zero).reshape(len(bytes_), columns)
