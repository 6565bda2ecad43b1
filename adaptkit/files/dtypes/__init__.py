"""Dtypes of tensors in files: their names, their sizes, and what torch calls them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "BLOCKED", "DTYPES", "GGML", "PACKED", "TORCH_NAMES", "UNREAD", "itemsize",
    "nbytes",
]  # fmt: skip

DTYPES: Mapping[str, int] = {  # bits per element
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# block-quantised types of GGUF: bits per element, scales included (gguf.GGML_QUANT_SIZES)
GGML: Mapping[str, float] = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375,
    "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.25,
}  # fmt: skip

# packed weights of checkpoints (adaptkit.files.packed): bits per element, about
PACKED: Mapping[str, float] = {
    "NF4": 4.5, "FP4": 4.5, "NVFP4": 4.5, "MXFP8": 8.25, "INT8": 8, "INT4": 4.5, "FP8": 8,
    "SVDQ_INT4": 4.25, "SVDQ_NVFP4": 4.5,
}  # fmt: skip
BLOCKED: Mapping[str, float] = {**GGML, **PACKED}  # read as float32
# packed weights that are only told by name
UNREAD: Mapping[str, float] = {
    "TORCHAO": 8, "TORCHAO_INT4_TILES": 4.5, "TORCHAO_INT4_INT32": 4.5, "TORCHAO_INT4_OPAQUE": 4.5,
    "TORCHAO_MX": 8.25, "TORCHAO_NVFP4": 4.5, "AWQ_INT4": 4.5, "SVDQ_INT4_OTHER": 4.25,
    "SVDQ_NVFP4_OTHER": 4.5,
}  # fmt: skip

# safetensors dtype -> attribute of torch; tensors of any other dtype can only be copied
TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def itemsize(dtype: str) -> int:
    """Bytes of one element; `NotRepresentable` for the packed 4-bit and 6-bit dtypes."""
    bits = DTYPES[dtype]
    if bits % 8:
        raise NotRepresentable(f"{dtype} packs {bits} bits per element, not whole bytes")
    return bits // 8


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a packed tensor."""
    bits = DTYPES.get(dtype) or BLOCKED.get(dtype) or UNREAD[dtype]
    return int(math.prod(shape) * bits) // 8
