"""nf4, fp4 and int8 of bitsandbytes, as transformers and diffusers store them.

Four bits (bitsandbytes `functional.py: dequantize_4bit`, QuantState.as_dict): of each byte the
higher half comes first; each half is a place in `quant_map`, whose number is multiplied by the
block's `absmax`. With nested scales, absmax = nested_quant_map[absmax] · nested_absmax +
nested_offset. Eight bits (`int8_vectorwise_dequant`): W = q · SCB / 127 by rows.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from adaptkit.files.packed.contract import Packed, described

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
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
    decode = partial(_decode_four, numbers=numbers, size=size, nested=nested, offset=offset)
    parts |= {"weight": weight, "state": state}
    return Packed(kind.upper(), tuple(shape), parts, decode)  # type: ignore[arg-type]


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


def _decode_four(
    stored: Mapping[str, Tensor], numbers: int, size: int, nested: Any, offset: float
) -> Tensor:
    import torch

    codes = stored["weight"].flatten()
    halves = torch.stack([codes >> 4, codes & 15], -1).flatten()[:numbers]
    absmax = stored["absmax"].flatten()
    if nested is not None:
        outer = stored["nested_absmax"].flatten().float().repeat_interleave(nested)[: len(absmax)]
        absmax = stored["nested_quant_map"].flatten().float()[absmax.int()] * outer + offset
    scales = absmax.float().repeat_interleave(size)[:numbers]
    return stored["quant_map"].flatten().float()[halves.int()].mul_(scales)


def _eight(source: TensorSource, key: str) -> Packed | None:
    module, infos = key.removesuffix(".SCB"), source.infos
    weight, order = f"{module}.weight", f"{module}.weight_format"
    info = infos.get(weight)
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        return None
    if infos[key].numel != info.shape[0] or infos[key].dtype not in ("F32", "F16", "BF16"):
        return None
    parts = {"weight": weight, "scale": key}
    if order in infos:
        if infos[order].numel != 1 or source.scalar(order) != ROW:
            return None
        parts["order"] = order
    return Packed("INT8", info.shape, parts, _decode_eight)


def _decode_eight(stored: Mapping[str, Tensor]) -> Tensor:
    return stored["weight"].float() * (stored["scale"].float().reshape(-1, 1) / 127.0)
