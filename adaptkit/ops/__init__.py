"""One file per verb: Options, plan, run, Report. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptkit.ops import convert, extract, inspect, merge

__all__ = ["convert", "extract", "inspect", "merge"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adaptkit.ops' has no attribute {name!r}")
    return import_module(f"adaptkit.ops.{name}")
