"""safetensors in NumPy alone: a header of JSON, then bytes. bf16 and fp8 are decoded and rounded by
their definitions.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Array = np.ndarray
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
# distance from 1 to the next number, halved: the relative rounding error
UNIT = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F8_E4M3": 2.0**-4}


def _e4m3() -> Array:
    """The value of every byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are
    NaN.
    """
    values = np.empty(256)
    for byte in range(256):
        sign = -1.0 if byte & 0x80 else 1.0
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        number = (
            mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
        values[byte] = np.nan if exponent == 15 and mantissa == 7 else sign * number
    return values


E4M3 = _e4m3()
POSITIVE = E4M3[:127]


def encode(value: Array, dtype: str) -> bytes:
    if dtype == "BOOL":
        return np.asarray(value).astype("u1").tobytes()
    if dtype == "BF16":
        bits = np.ascontiguousarray(value, dtype="<f4").view("<u4").astype("u8")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    if dtype == "F8_E4M3":
        size = np.abs(np.asarray(value, dtype="f8"))
        near = np.clip(np.searchsorted(POSITIVE, size), 1, 126)
        low = size - POSITIVE[near - 1] < POSITIVE[near] - size
        return ((near - low) | np.where(np.signbit(value), 0x80, 0)).astype("u1").tobytes()
    with np.errstate(over="ignore"):  # an infinite alpha in fp16 is what such files hold
        return np.ascontiguousarray(value, dtype=PLAIN[dtype]).tobytes()


def decode(data: bytes, dtype: str, shape: list[int]) -> Array:
    if dtype == "BOOL":
        return np.frombuffer(data, "u1").reshape(shape).astype("f8")
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(shape).astype("f8")
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(data, "u1")].reshape(shape)
    return np.frombuffer(data, PLAIN[dtype]).reshape(shape).astype("f8")


def rounded(value: Array, dtype: str) -> Array:
    """What a reader gets of `value` when it is stored as `dtype`."""
    value = np.asarray(value, dtype="f8")
    return decode(encode(value, dtype), dtype, list(value.shape))


@dataclass
class File:
    """What one file holds: values in float64, the stored types, the metadata."""

    tensors: dict[str, Array] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)  # adapter_config.json beside it

    def put(self, key: str, value: Array, dtype: str) -> None:
        assert key not in self.tensors, key
        self.tensors[key], self.dtypes[key] = rounded(value, dtype), dtype


def write(path: Path, file: File) -> None:
    """A file, or (where there is a configuration) a PEFT folder."""
    if file.config:
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(file.config))
        path = path / "adapter_model.safetensors"
    header: dict[str, object] = {"__metadata__": file.metadata} if file.metadata else {}
    parts, at = [], 0
    for key, value in file.tensors.items():
        data = encode(value, file.dtypes[key])
        header[key] = {
            "dtype": file.dtypes[key],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def read(path: Path) -> File:
    file = File()
    if path.is_dir() and (path / "adapter_config.json").exists():
        file.config = json.loads((path / "adapter_config.json").read_text())
        path = path / "adapter_model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    file.metadata = header.pop("__metadata__", {})
    for key, about in header.items():
        start, stop = (8 + size + n for n in about["data_offsets"])
        file.tensors[key] = decode(data[start:stop], about["dtype"], about["shape"])
        file.dtypes[key] = about["dtype"]
    return file
