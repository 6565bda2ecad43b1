"""Inspect, extract, convert, combine and merge diffusion-model adapters.

The public API is imported on first use, so that ``import adaptkit`` is fast and never loads torch::

    import adaptkit as ak
    style = ak.open("style.safetensors")  # or a state dict
    style.modules["unet.mid_block.attentions.0.proj_in"].delta()
    style.convert(host="comfyui").save("for-comfyui.safetensors")
    merged = ak.merge(unet_state_dict, [(style, 0.8)])
    lora = ak.extract(base_state_dict, tuned_state_dict, rank=32)

`adaptkit.ops` has the verbs of the command line, each with Options, plan and run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.7.0"

if TYPE_CHECKING:
    from adaptkit import ops
    from adaptkit.adapter import Adapter
    from adaptkit.api import AdapterFile, Inspected, combine, extract, inspect, merge, open
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.entries import Entry
    from adaptkit.errors import AdaptkitError
    from adaptkit.names import Rows, Slot, Target

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdaptkitError",
    "Checkpoint",
    "Entry",
    "Inspected",
    "Rows",
    "Slot",
    "Target",
    "__version__",
    "combine",
    "extract",
    "inspect",
    "merge",
    "open",
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
    **dict.fromkeys(
        ("AdapterFile", "Inspected", "combine", "extract", "inspect", "merge", "open"),
        "adaptkit.api",
    ),
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
