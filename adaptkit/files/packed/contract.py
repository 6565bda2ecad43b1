"""What is known of a packed weight from a header and its description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import AdaptkitError
from adaptkit.files.limits import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from adaptkit.files.source import TensorSource

__all__ = ["Packed", "described"]


class Packed(NamedTuple):
    """A packed weight: the name and shape that it is shown with, its tensors, and its numbers.

    `parts` are the keys of all its tensors by part, `weight` among them. `decode` takes them as
    stored and gives float32 numbers in the order of `shape`. `scaled`: these are the stored numbers
    times their scale.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    scaled: bool = False


def described(source: TensorSource, key: str) -> dict[str, Any]:
    """The JSON object in a tensor of bytes; empty if it holds none."""
    try:
        found = read_json(bytes(source.raw(key)), key)
    except (AdaptkitError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
