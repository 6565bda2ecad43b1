"""The verbs of adaptkit, each with Options, plan, run and Report; imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptkit.ops import (
        advise,
        batch,
        combine,
        compare,
        convert,
        extract,
        inspect,
        merge,
        metadata,
        resize,
    )

__all__ = [
    "advise",
    "batch",
    "combine",
    "compare",
    "convert",
    "extract",
    "inspect",
    "merge",
    "metadata",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adaptkit.ops' has no attribute {name!r}")
    return import_module(f"adaptkit.ops.{name}")
