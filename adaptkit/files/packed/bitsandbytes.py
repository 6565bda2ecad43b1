"""nf4, fp4 and int8 of bitsandbytes, as transformers and diffusers store them.

Four bits (bitsandbytes `functional.py: quantize_4bit, dequantize_4bit`, QuantState.as_dict): of
each byte the higher half comes first; each half is a place in `quant_map`, whose number is
multiplied by the block's `absmax`. With nested scales, absmax = nested_quant_map[absmax] ·
nested_absmax + nested_offset. A block is packed with its largest magnitude as absmax, nested ones
with the offset of the file, and each number at the nearest place. Eight bits
(`int8_vectorwise_dequant`): W = q · SCB / 127 by rows.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.files.packed.description import described
from adaptkit.files.packed.int8 import int8
from adaptkit.files.packing import (
    Packed,
    Packing,
    divided,
    joined,
    largest,
    nearest,
    slices,
    widths,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Was
    from adaptkit.files.source import TensorSource

__all__ = ["find"]

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
ROW = 0.0  # the only order of rows that newer versions write


def find(source: TensorSource) -> dict[str, Packed]:
    """The packed weights of a file, by name; those that are described wrongly are left out."""
    found: dict[str, Packed] = {}
    for key in source.infos:
        match = _STATE.fullmatch(key)
        if match is not None and match["weight"] in source.infos:
            one = _four(source, match["weight"], match["kind"], key)
        elif key.endswith(".SCB"):
            one = _eight(source, key)
        else:
            continue
        if one is not None:
            found[one.parts["weight"]] = one
    return found


def _four(source: TensorSource, weight: str, kind: str, state: str) -> Packed | None:
    said, infos = described(source, state), source.infos
    parts = {part: f"{weight}.{part}" for part in PARTS if f"{weight}.{part}" in infos}
    shape, size = said.get("shape"), said.get("blocksize")
    if not _sizes(shape) or not isinstance(size, int) or size < 1 or size % 2:
        return None
    numbers = math.prod(shape)  # type: ignore[arg-type]
    blocks = -(-numbers // size)
    nested = said.get("nested_blocksize") if "nested_absmax" in parts else None
    fits = (
        {"absmax", "quant_map"} <= parts.keys()
        and infos[weight].dtype == "U8"
        and infos[weight].numel == -(-numbers // 2)
        and infos[parts["absmax"]].numel == blocks
        and infos[parts["quant_map"]].numel == 16
        and said.get("quant_type") == kind
        and _nested(infos, parts, nested, blocks)
    )
    if not fits:
        return None
    offset = float(said.get("nested_offset", 0.0))
    form = _Form(numbers, size, nested, offset)
    parts |= {"weight": weight, "state": state}
    scales = ("absmax",) if nested is None else ("absmax", "nested_absmax")
    packing = Packing(
        ("weight", *scales), partial(_encode, form=form), partial(_allowed, form=form)
    )
    numbers_of = partial(_numbers, form=form)
    return Packed(kind.upper(), tuple(shape), parts, numbers_of, packing)  # type: ignore[arg-type]


class _Form(NamedTuple):
    """How many numbers in blocks of `size`, and of how many blocks the scales of scales are."""

    numbers: int
    size: int
    nested: int | None
    offset: float


def _nested(
    infos: Mapping[str, TensorInfo], parts: Mapping[str, str], size: object, blocks: int
) -> bool:
    """Whether scales of scales fit, if there are any."""
    if "nested_absmax" not in parts:
        return infos[parts["absmax"]].dtype == "F32"
    return (
        isinstance(size, int)
        and size > 0
        and "nested_quant_map" in parts
        and infos[parts["absmax"]].dtype == "U8"
        and infos[parts["nested_absmax"]].numel == -(-blocks // size)
        and infos[parts["nested_quant_map"]].numel == 256
    )


def _sizes(shape: object) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)


def _absmax(stored: Mapping[str, Tensor], form: _Form) -> Tensor:
    """The scale of every block, float32."""
    absmax = stored["absmax"].flatten()
    if form.nested is None:
        return absmax.float()
    outer = stored["nested_absmax"].flatten().float().repeat_interleave(form.nested)
    inner = stored["nested_quant_map"].flatten().float()[absmax.int()]
    return inner * outer[: len(absmax)] + form.offset


def _numbers(stored: Mapping[str, Tensor], form: _Form) -> Iterator[Tensor]:
    return _each(stored, form, stored["quant_map"].flatten().float())


def _each(stored: Mapping[str, Tensor], form: _Form, table: Tensor) -> Iterator[Tensor]:
    """What a table holds for each number, times the scale of its block; some at a time."""
    import torch

    codes, absmax = stored["weight"].flatten(), _absmax(stored, form)
    for cut in slices(len(absmax), form.size):
        bytes_ = codes[cut.start * form.size // 2 : cut.stop * form.size // 2]
        halves = torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten()
        count = min(form.numbers, cut.stop * form.size) - cut.start * form.size
        scales = absmax[cut].repeat_interleave(form.size)[:count]
        yield table[halves.int()][:count].mul_(scales)


def _allowed(stored: Mapping[str, Tensor], numbers: Tensor, form: _Form) -> Tensor:
    """Half the gap to the next place, and what the rounding of nested scales may cut off."""
    each = _each(stored, form, widths(stored["quant_map"].flatten()))
    found = joined(each, form.numbers).abs_()
    if form.nested is not None:
        outer = float(stored["nested_absmax"].float().abs().max())
        found += outer * float(widths(stored["nested_quant_map"].flatten()).max())
    return found.reshape(numbers.shape)


def _encode(new: Tensor, old: Was, stored: Mapping[str, Tensor], form: _Form) -> dict[str, Tensor]:
    import torch

    fresh, same = _scales(_blocks(new, form), _blocks(old.same, form, True), stored, form)
    absmax, table = _absmax({**stored, **fresh}, form), stored["quant_map"].flatten()
    numbers, codes = _blocks(new, form), stored["weight"].flatten()
    found = torch.empty(len(absmax) * form.size // 2, dtype=torch.uint8)
    for cut in slices(len(absmax), form.size):
        halves = nearest(table, divided(numbers[cut].float(), absmax[cut].unsqueeze(-1)))
        packed = (halves[:, 0::2] << 4) | halves[:, 1::2]
        found[cut.start * form.size // 2 : cut.stop * form.size // 2] = packed.flatten()
    found = found[: len(codes)]
    kept = same.repeat_interleave(form.size // 2)[: len(codes)]
    found = torch.where(kept, codes, found).reshape(stored["weight"].shape)
    return {"weight": found, **fresh}


def _blocks(numbers: Tensor, form: _Form, after: float = 0.0) -> Tensor:
    """Numbers (blocks, size), with `after` behind the last."""
    import torch

    flat = numbers.reshape(-1)
    rest = -len(flat) % form.size
    flat = torch.nn.functional.pad(flat, (0, rest), value=after) if rest else flat
    return flat.reshape(-1, form.size)


def _scales(
    new: Tensor, kept: Tensor, stored: Mapping[str, Tensor], form: _Form
) -> tuple[dict[str, Tensor], Tensor]:
    """The scales of all blocks as they are stored, and which blocks keep their bytes."""
    import torch

    same = kept.all(-1)
    top = largest(new, by_row=True).float()
    if form.nested is None:
        before = stored["absmax"]
        kept = torch.where(same, before.flatten(), top.to(before.dtype))
        return {"absmax": kept.reshape(before.shape)}, same
    # a scale of scales that changes would change every block beneath it
    groups = torch.nn.functional.pad(same, (0, -len(same) % form.nested), value=True)
    whole = groups.reshape(-1, form.nested).all(-1)
    same = whole.repeat_interleave(form.nested)[: len(same)]
    apart = torch.nn.functional.pad(top - form.offset, (0, -len(top) % form.nested))
    apart = apart.reshape(-1, form.nested)
    outer = stored["nested_absmax"]
    fresh = torch.where(whole, outer.flatten(), apart.abs().amax(-1).to(outer.dtype))
    scaled = divided(apart, fresh.float().unsqueeze(-1))
    codes = nearest(stored["nested_quant_map"].flatten(), scaled).flatten()[: len(top)]
    codes = torch.where(same, stored["absmax"].flatten(), codes)
    found = {"absmax": codes.reshape(stored["absmax"].shape)}
    return {**found, "nested_absmax": fresh.reshape(outer.shape)}, same


def _eight(source: TensorSource, key: str) -> Packed | None:
    module, infos = key.removesuffix(".SCB"), source.infos
    weight, order = f"{module}.weight", f"{module}.weight_format"
    info = infos.get(weight)
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        return None
    if infos[key].numel != info.shape[0]:
        return None
    parts = {"weight": weight, "scale": key}
    if order in infos:
        if infos[order].numel != 1 or source.scalar(order) != ROW:
            return None
        parts["order"] = order
    return int8(info, infos[key], parts, {}, unit=1 / 127)
