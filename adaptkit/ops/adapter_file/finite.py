"""Find numbers that are none, without torch: a renamed tensor is copied, not computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
_AT_ONCE = 1 << 17  # numbers, so that they stay in the cache


def non_finite(source: TensorSource, names: Iterable[str]) -> Iterator[str]:
    """The tensors of a file that hold NaN or infinity; integers hold none."""
    import numpy as np

    for name in names:
        info = source.infos[name]
        if info.dtype not in EXPONENTS or not info.numel:
            continue
        kind, mask = EXPONENTS[info.dtype]
        numbers = np.frombuffer(source.raw(name), dtype=kind)
        parts = (numbers[n : n + _AT_ONCE] for n in range(0, len(numbers), _AT_ONCE))
        if any(int((part & part.dtype.type(mask)).max()) == mask for part in parts):
            yield name
