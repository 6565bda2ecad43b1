"""Inspect, extract, convert, combine and merge diffusion-model adapters.

The public API is imported on first use, so that ``import adaptkit`` is fast and never loads torch::

    from adaptkit import Adapter, Checkpoint, ops
    adapter = Adapter.open("style.safetensors")
    options = ops.extract.Options(algo="lokr", factor=8)
    report = ops.extract.run(ops.extract.plan(base, tuned, options))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.7.0"

if TYPE_CHECKING:
    from adaptkit import ops
    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.entries import Entry
    from adaptkit.errors import AdaptkitError
    from adaptkit.names import Rows, Slot, Target

__all__ = [
    "Adapter",
    "AdaptkitError",
    "Checkpoint",
    "Entry",
    "Rows",
    "Slot",
    "Target",
    "__version__",
    "ops",
]

_HOMES = {
    "Adapter": "adaptkit.adapter",
    "Entry": "adaptkit.entries",
    "Checkpoint": "adaptkit.checkpoint",
    "AdaptkitError": "adaptkit.errors",
    "Rows": "adaptkit.names",
    "Slot": "adaptkit.names",
    "Target": "adaptkit.names",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ops":
        return import_module("adaptkit.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
