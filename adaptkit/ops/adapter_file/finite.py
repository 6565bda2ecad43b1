"""Find numbers that are none, without torch: a renamed tensor is copied, not computed.

NumPy is imported only for a tensor whose first bytes leave a doubt, which takes a number of 1e38.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.header import itemsize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptkit.files.source import TensorSource

__all__ = ["non_finite"]

# the bits that are all set in NaN and infinity, by the unsigned integer of the same width
EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # no infinity, and one NaN of either sign
}
_AT_ONCE = 1 << 20  # bytes, so that they stay in the cache


# the first bytes of NaN and infinity: sign and the upper bits of the exponent
_FIRST = {
    "F16": bytes((*range(0x7C, 0x80), *range(0xFC, 0x100))),
    "F8_E5M2": bytes((*range(0x7C, 0x80), *range(0xFC, 0x100))),
}
_USUAL = bytes((0x7F, 0xFF))


def non_finite(source: TensorSource, names: Iterable[str]) -> Iterator[str]:
    """The tensors of a file that hold NaN or infinity; integers hold none."""
    for name in names:
        info = source.infos[name]
        if info.dtype not in EXPONENTS or not info.numel:
            continue
        raw = memoryview(source.raw(name)).cast("B")
        parts = (bytes(raw[n : n + _AT_ONCE]) for n in range(0, len(raw), _AT_ONCE))
        if any(_doubtful(part, info.dtype) and _has_none(part, info.dtype) for part in parts):
            yield name


def _doubtful(raw: bytes, dtype: str) -> bool:
    """Whether the upper byte of a number is one that NaN or infinity has."""
    width = itemsize(dtype)
    upper = raw[width - 1 :: width]  # safetensors is little-endian
    return any(bytes((byte,)) in upper for byte in _FIRST.get(dtype, _USUAL))


def _has_none(raw: bytes, dtype: str) -> bool:
    import numpy as np

    kind, mask = EXPONENTS[dtype]
    numbers = np.frombuffer(raw, dtype=kind)
    return bool(((numbers & numbers.dtype.type(mask)) == mask).any())
