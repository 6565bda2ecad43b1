"""Forge's patches: `diffusion_model.….weight::lora::0`, as layer diffusion is published.

Source: stable-diffusion-webui-forge, `backend/patcher/unet.py: load_frozen_patcher` and
`backend/patcher/lora.py`. A name is that of a parameter, the kind of the patch, and the place of
the tensor in ComfyUI's tuple of that kind.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.files.header import TensorInfo

__all__ = ["LAYOUT", "find"]

LAYOUT = "forge"
_NAME = re.compile(r"(?P<module>.+)\.(?P<param>weight|bias)::(?P<kind>\w+)::(?P<place>\d+)")
_HADA = ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2")
DORA = "dora_scale"
# kind → the suffixes of a weight's tensors, by their place
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", DORA),
    "loha": (*(role if role == "alpha" else f"hada_{role}" for role in _HADA), DORA),
    "lokr": (*(role if role == "alpha" else f"lokr_{role}" for role in _LOKR), DORA),
    "diff": ("diff",),
    "set": ("set_weight",),
}
BIASES = {"diff": ("diff_b",)}


def find(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """The tensors of a file by the names that ComfyUI gives them; None if none is Forge's."""
    named = {key: name for key in infos if "::" in key and (name := _suffix(key)) is not None}
    if not named:
        return None
    found: dict[str, TensorInfo] = {}
    for key, info in infos.items():
        name = named.get(key, key)
        # of two tensors of one name neither is lost: one keeps a name that nobody knows
        found[key if name in found or (name != key and name in infos) else name] = info
    return found


def _suffix(key: str) -> str | None:
    """ComfyUI's name of a tensor; None if it has none."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    known = (SUFFIXES if match["param"] == "weight" else BIASES).get(match["kind"], ())
    place = int(match["place"]) if len(match["place"]) < 3 else len(known)
    return f"{match['module']}.{known[place]}" if place < len(known) else None
