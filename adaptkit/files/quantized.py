"""Read quantized weights: find their scales, and widen them.

Supported: fp8 (e4m3, e5m2), plain or with a scale tensor, as ComfyUI writes them (`scale_weight`,
since 2025-11 `weight_scale`; ComfyUI QUANTIZATION.md), musubi-tuner and diffusers. A scale is one
number, one per row, or one per block of a row. The blocks of GGUF files, see adaptkit.files.gguf;
packed weights, see adaptkit.files.packed. Any other scheme is named and refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.files.dtypes.widening import widen
from adaptkit.files.header import BLOCKED, nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource

__all__ = ["FLOATS", "FP8", "Quantization", "read_widened"]

FLOATS = ("F64", "F32", "F16", "BF16")  # computed with as stored
FP8 = ("F8_E4M3", "F8_E5M2")

_SCALES = ("scale_weight", "weight_scale")
# scales of activations, and a description that repeats the scales
_UNUSED = ("scale_input", "input_scale", "comfy_quant")
_FOREIGN = {  # suffixes of schemes that change the meaning of the stored numbers
    "weight_scale_2": "nvfp4",
    "weight_scale_inv": "fp8 with a scale per block of rows and columns",
    "pre_quant_scale": "weights with their input channels rescaled",
    "weight_zero_point": "integers with a zero point",
    "SCB": "int8 (bitsandbytes)",
    "nf4": "nf4 (bitsandbytes)",
    "fp4": "fp4 (bitsandbytes)",
    "absmax": "integers (bitsandbytes)",
}
_BITSANDBYTES = re.compile(
    r"(?P<weight>.+)\.(absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?P<kind>nf4|fp4))"
)
_MARK = "scaled_fp8"  # an empty top-level tensor with the dtype of the weights
_INTEGERS = {"I8": "int8", "U8": "packed integers"}


@dataclass(frozen=True)
class Quantization:
    """The quantization of a file's weights.

    `scales` maps a weight to the key of its scale, `refused` a weight to the name of an unsupported
    scheme. `extras` are the keys that belong to such weights.
    """

    scales: Mapping[str, str]
    refused: Mapping[str, str]
    extras: frozenset[str]

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo]) -> Quantization:
        """Detect quantization from a header."""
        beside: dict[str, dict[str, str]] = {}
        extras = {name for name in infos if name.rpartition(".")[2] == _MARK}
        for name in infos:
            if (found := _belongs(name, infos)) is not None:
                beside.setdefault(found[0], {})[found[1]] = name
                extras.add(name)
        scales: dict[str, str] = {}
        refused: dict[str, str] = {}
        for weight, parts in beside.items():
            scale = [parts[kind] for kind in _SCALES if kind in parts]
            reason = _scheme(infos[weight], [infos[key] for key in scale], parts)
            if reason is not None:
                refused[weight] = reason
            elif scale:
                scales[weight] = scale[0]
        return cls(scales, refused, frozenset(extras))

    def refusal(self, info: TensorInfo) -> str | None:
        """The unsupported scheme of this tensor; None if it can be read."""
        if info.name in self.refused:
            return self.refused[info.name]
        read = info.dtype in FLOATS + FP8 or info.dtype in BLOCKED or info.name in self.scales
        return None if read else _INTEGERS.get(info.dtype, info.dtype)

    def widens(self, info: TensorInfo) -> bool:
        """Whether a tensor is read in a wider dtype than it is stored."""
        return info.dtype in FP8 or info.dtype in BLOCKED or info.name in self.scales

    def wide_bytes(self, info: TensorInfo) -> int:
        """Bytes of a tensor that `widens`, after reading."""
        return nbytes("F64" if info.dtype == "F64" else "F32", info.shape)


def _belongs(name: str, infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """(weight, part) of a key that belongs to a weight, or None."""
    if (match := _BITSANDBYTES.fullmatch(name)) is not None and match["weight"] in infos:
        return match["weight"], match["kind"] or "absmax"
    module, _, kind = name.rpartition(".")
    known = kind in _SCALES or kind in _UNUSED or kind in _FOREIGN
    return (f"{module}.weight", kind) if known and f"{module}.weight" in infos else None


def _scheme(weight: TensorInfo, scales: list[TensorInfo], parts: Mapping[str, str]) -> str | None:
    """The name of an unsupported scheme; None if supported."""
    if foreign := next((name for kind, name in _FOREIGN.items() if kind in parts), None):
        return foreign
    if weight.dtype not in FLOATS + FP8:
        return _INTEGERS.get(weight.dtype, weight.dtype)
    # `scale_weight` and `weight_scale` on one weight: which applies is undefined
    if len(scales) > 1:
        return "a weight with two scales"
    # mxfp8 stores its block scales as E8M0 bytes (OCP Microscaling specification 1.0)
    if any(scale.dtype not in FLOATS for scale in scales):
        return "mxfp8"
    if not all(_fits(weight.shape, scale.shape) for scale in scales):
        return f"{weight.dtype} {list(weight.shape)} with scales {list(scales[0].shape)}"
    return None


def _fits(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether a scale is per tensor, row or block of a row.

    Shapes: (), (m) or (m, 1, …), (m, blocks, 1).
    """
    if math.prod(scale) == 1 or (weight[:1] == scale[:1] and math.prod(scale) == scale[0]):
        return True
    blocks = len(weight) == 2 and len(scale) == 3 and (scale[0], scale[2]) == (weight[0], 1)
    # blocks must divide the row, as `read_widened` views it (rows, blocks, entries)
    return blocks and scale[1] > 0 and weight[1] % scale[1] == 0


def read_widened(
    source: TensorSource, quantization: Quantization, name: str, rows: tuple[int, int] | None = None
) -> Tensor:
    """Read a tensor, or some of its rows, with its scale applied.

    fp8 and scaled weights come as float32 (a scaled float64 as float64), others as stored.
    """
    cut = None if rows is None else slice(*rows)
    part = source.read(name, cut)
    if not quantization.widens(source.infos[name]):
        return part
    import torch

    wide = widen(part, torch.float64 if part.dtype == torch.float64 else torch.float32)
    if name not in quantization.scales:
        return wide
    key = quantization.scales[name]
    by_row = source.infos[key].numel > 1
    scale = source.read(key, cut if by_row else None).to(wide.dtype)
    if not by_row:
        return wide.mul_(scale.reshape(()))
    # one number per block of a row, or per row
    wide.view(len(scale), scale[0].numel(), -1).mul_(scale.view(len(scale), -1, 1))
    return wide
