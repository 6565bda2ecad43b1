"""Detect family and format from a header, with evidence."""

from __future__ import annotations

from adaptkit.detect.foreign import foreign, hint_for
from adaptkit.detect.search import (
    ENOUGH,
    Detection,
    Nearest,
    chosen,
    detect_adapter,
    detect_checkpoint,
    families,
    formats,
    is_adapter,
    spelled_as_adapter,
)

__all__ = [
    "ENOUGH",
    "Detection",
    "Nearest",
    "chosen",
    "detect_adapter",
    "detect_checkpoint",
    "families",
    "foreign",
    "formats",
    "hint_for",
    "is_adapter",
    "spelled_as_adapter",
]
