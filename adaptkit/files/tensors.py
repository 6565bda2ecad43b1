"""Tensors and their bytes: dtype names, buffers, single numbers."""

from __future__ import annotations

import math
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NonFinite, ShapeMismatch, UnreadableFile
from adaptkit.files.dtypes.widening import widen
from adaptkit.files.header import TORCH_NAMES, TensorInfo, TensorSpec
from adaptkit.process import huge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch


__all__ = [
    "SCALARS",
    "bytes_of",
    "check_finite",
    "decode_scalar",
    "dtype_name",
    "empty_bytes",
    "finite",
    "packed_float32",
    "reading_into",
    "row_range",
    "spec_of",
    "tensor_bytes",
    "torch_dtype",
]


def row_range(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """First row and number of rows of a slice.

    (0, 0) for the whole tensor.
    """
    if rows is None:
        return 0, 0
    if not info.shape:
        raise ShapeMismatch("a single number has no rows", tensor=info.name)
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ShapeMismatch(
            f"rows must be adjacent, got a slice with step {step}", tensor=info.name
        )
    return start, max(stop - start, 0)


class _Reading(threading.local):
    """Where the calling thread reads to; None: to memory of each tensor's own."""

    take: Callable[[int], torch.Tensor | None] | None = None


_reading = _Reading()


@contextmanager
def reading_into(take: Callable[[int], torch.Tensor | None]) -> Iterator[None]:
    """Read tensors to where `take` says, in this thread and block.

    `take` gets a number of bytes and gives so many, uint8, or None for memory of the tensor's own.
    """
    before, _reading.take = _reading.take, take
    try:
        yield
    finally:
        _reading.take = before


def empty_bytes(info: TensorInfo, path: Path, size: int) -> torch.Tensor:
    """Uninitialised bytes for a tensor, in huge pages if large, or where `reading_into` says."""
    import torch

    torch_dtype(info, path)
    if _reading.take is not None and (place := _reading.take(size)) is not None:
        return place
    block = huge(size)
    return (
        torch.empty(size, dtype=torch.uint8)
        if block is None
        else torch.frombuffer(block, dtype=torch.uint8, count=size)
    )


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise `NonFinite` if a computed tensor, in memory to be written, holds NaN or infinity."""
    if not finite(tensor):
        raise NonFinite(
            "it would hold NaN or infinity, so nothing is written",
            hint="the input holds some, or numbers too large or too small to compute with; "
            "`adaptkit inspect --stats` tells which tensors",
            file=path,
            tensor=name,
        )


def finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, in one pass without a mask."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # torch knows no extremes of 8-bit floats; NaN and infinity are extremes
    wide = widen(tensor, torch.float32) if tensor.dtype.itemsize == 1 else tensor
    low, high = wide.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())  # one wait for a device


def packed_float32(value: float, name: str, path: Path) -> bytes:
    """The bytes of one float32; `NonFinite` if it is none."""
    try:
        raw = struct.pack("<f", value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise NonFinite(f"{value} cannot be stored in 32 bits", file=path, tensor=name)
    return raw


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """A byte tensor as a memory view, without a copy."""
    array: Any = buffer.numpy()  # numpy's stubs hide the buffer protocol before Python 3.12
    return memoryview(array)


def torch_dtype(info: TensorInfo, path: Path) -> torch.dtype:
    """The torch dtype of a tensor; `UnreadableFile` if torch has none."""
    import torch

    dtype = getattr(torch, TORCH_NAMES.get(info.dtype, ""), None)
    if dtype is None:
        message = f"torch {torch.__version__} has no dtype for {info.dtype}"
        raise UnreadableFile(
            message, file=path, tensor=info.name, hint="such tensors can only be copied unchanged"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


_STRUCT = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip
# dtypes of which a single number can be read
SCALARS = (*_STRUCT, "BF16", "F8_E5M2", "F8_E4M3")


def decode_scalar(raw: bytes, info: TensorInfo, path: Path) -> float:
    """Decode the bytes of one number without torch."""
    if info.dtype in _STRUCT:
        return float(struct.unpack(_STRUCT[info.dtype], raw)[0])
    if info.dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if info.dtype == "F8_E5M2":  # the upper half of a float16
        return float(struct.unpack("<e", b"\0" + raw)[0])
    if info.dtype == "F8_E4M3":
        return _decode_e4m3(raw[0])
    raise UnreadableFile(
        f"a number of dtype {info.dtype} cannot be decoded", file=path, tensor=info.name
    )


def _decode_e4m3(byte: int) -> float:
    """Decode one sign, four exponent (bias 7) and three mantissa bits (arXiv:2209.05433).

    There is no infinity; 0x7f is NaN.
    """
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, -9)
    return sign * math.ldexp(8 + mantissa, exponent - 10)


_SAFETENSORS_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; copied unless contiguous on the CPU."""
    import torch

    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # a dimension of size 1 may have any stride, which view() refuses
    flat = whole.as_strided((whole.numel(),), (1,))
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype, or torch's own name."""
    name = str(dtype).removeprefix("torch.")
    return _SAFETENSORS_NAMES.get(name, name)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor stored under `name`."""
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
