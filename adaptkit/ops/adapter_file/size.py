"""The size of an adapter file, exact, and that of one module, estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.header import DTYPES, build_header, nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adaptkit.files.header import TensorSpec

__all__ = ["ALPHA_BYTES", "exact_size", "module_size"]

ALPHA_BYTES = 4  # alpha is stored as one float32
ENTRY = 76  # bytes of a header entry beside its key: dtype, shape and offsets of usual length


def exact_size(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that holds these tensors and this metadata."""
    header, _ = build_header(specs, metadata)
    return len(header) + sum(nbytes(spec.dtype, spec.shape) for spec in specs)


def module_size(numbers: int, dtype: str, stem: str, tensors: int, *, alpha: bool) -> int:
    """Bytes that one module adds to a file, its header entries estimated.

    `numbers` are stored as `dtype` in `tensors` tensors whose keys begin with `stem`; `alpha` adds
    one more. Ranks are compared by this; the size of a file is `exact_size`.
    """
    entries = (tensors + alpha) * (len(stem) + ENTRY)
    return numbers * DTYPES[dtype] // 8 + ALPHA_BYTES * alpha + entries
