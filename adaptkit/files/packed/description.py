"""The JSON that describes a packed weight, in a tensor of bytes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError
from adaptkit.files.limits import read_json

if TYPE_CHECKING:
    from adaptkit.files.source import TensorSource

__all__ = ["described"]


def described(source: TensorSource, key: str) -> dict[str, Any]:
    """The JSON object in a tensor of bytes; empty if it holds none."""
    try:
        found = read_json(bytes(source.raw(key)), key)
    except (AdaptkitError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
