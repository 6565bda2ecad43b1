"""nvfp4, mxfp8 and int8 of ComfyUI, which a `comfy_quant` tensor beside the weight names.

Without that name they are not read: other programs store the halves of a byte, and the scales of
blocks, in another order under the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packed.description import described
from adaptkit.files.packed.int8 import int8
from adaptkit.files.packed.mxfp8 import mxfp8
from adaptkit.files.packed.nvfp4 import nvfp4

if TYPE_CHECKING:
    from adaptkit.files.packing import Packed
    from adaptkit.files.source import TensorSource

__all__ = ["find"]

NAME = ".comfy_quant"
# what a description may say without meaning other numbers
HARMLESS = frozenset(
    {
        "format", "convrot", "convrot_groupsize", "per_row", "orig_dtype", "orig_shape",
        "full_precision_matrix_mult",
    }
)  # fmt: skip
# beside a weight, and of no meaning to it: the scale of activations
BESIDE = ("input_scale", "scale_input")


def find(source: TensorSource) -> dict[str, Packed]:
    """The packed weights of a file, by name; those that are described wrongly are left out."""
    found: dict[str, Packed] = {}
    for key in source.infos:
        if key.endswith(NAME) and f"{key.removesuffix(NAME)}.weight" in source.infos:
            one = _one(source, key)
            if one is not None:
                found[one.parts["weight"]] = one
    return found


def _one(source: TensorSource, key: str) -> Packed | None:
    module, infos = key.removesuffix(NAME), source.infos
    said = described(source, key)
    names = {"weight": "weight", "scale": "weight_scale", "second": "weight_scale_2"}
    parts = {
        part: f"{module}.{name}" for part, name in names.items() if f"{module}.{name}" in infos
    }
    weight, scale = infos[parts["weight"]], infos.get(parts.get("scale", ""))
    if scale is None or len(weight.shape) != 2 or not said.keys() <= HARMLESS:
        return None
    parts |= {name: f"{module}.{name}" for name in BESIDE if f"{module}.{name}" in infos}
    parts["name"] = key
    match said.get("format"):
        case "nvfp4":
            return nvfp4(weight, scale, infos.get(parts.get("second", "")), parts)
        case "mxfp8":
            return mxfp8(weight, scale, parts)
        case "int8_tensorwise":
            return int8(weight, scale, parts, said)
    return None
