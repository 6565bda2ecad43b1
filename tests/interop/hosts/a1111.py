"""The LoRA extension of AUTOMATIC1111's WebUI in our own words.

Read as it is in version 1.10: `extensions-builtin/Lora/networks.py` in a stored copy that names no commit, the modules
`network.py`, `network_lora.py`, `network_hada.py`, `network_lokr.py` and `network_full.py` in Forge at dfdcbab, which
copied them. Names were compared with those that `networks.py` of 1.8.0 (bef51ae) converts.

A key ends at its first dot. What stands before it is turned into the name of a layer of the original model; a layer
that is found must have tensors of a known kind, else the whole file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.names import Target
from tests.interop.hosts.files import File, Part, is_denoiser
from tests.interop.hosts.loaded import Loaded, Place, RefusedError, same
from tests.synth import expand, fill

VERSION = "1.10"
DATE = "2024-07"

TEXT = {
    "sd1": {"text_encoder": ("lora_te_", "lora_te1_")},
    "sd2": {"text_encoder": ("lora_te_",)},
    "sdxl": {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)},
}
LAYERS = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(?:[qkv]|out)_proj)"
)
# names of diffusers that its rules do not turn into those of the original
UNCONVERTED = {
    "sdxl": r"^(up_blocks\.0\.upsamplers|add_embedding)",
    "sdxl-refiner": r"^add_embedding",
}
KINDS: tuple[tuple[str, ...], ...] = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ("diff",),
)


@cache
def key_map(family: str) -> Mapping[str, Place]:
    """Every stem that it finds a layer for."""
    found: dict[str, Place] = {}
    for part in families()[family].components:
        for row in part.rows:
            for indices in expand(row) if row.kind is Kind.MATRIX else ():
                target = Target(part.name, fill(row.target, indices))
                for naming in ("native", "diffusers"):
                    for name in row.names.get(naming, ()):
                        module = fill(name.module, indices)
                        joined, place = module.replace(".", "_"), Place(target, name.rows)
                        if not is_denoiser(part.name):
                            for prefix in TEXT.get(family, {}).get(part.name, ()):
                                if LAYERS.fullmatch(module):
                                    found[prefix + joined] = place
                        elif naming == "native" or not re.search(
                            UNCONVERTED.get(family, "^$"), module
                        ):
                            found[f"lora_unet_{joined}"] = place
    return found


def right(part: Part, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether what is computed of these tensors is what was meant."""
    if "lora_A.weight" in tensors:  # all other tensors are thrown away
        return not {"alpha", "dora_scale", "lora_magnitude_vector"} & set(tensors)
    scale = tensors.get("dora_scale")
    return scale is None or scale[0] != part.shape[0]


def load(file: File) -> Loaded:
    """What A1111 loads of a file."""
    if file.metadata.get("lora_adapter_metadata"):
        raise RefusedError("alpha in metadata is not read")
    keys, stems = key_map(file.family), {part.stem: part for part in file.parts}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (_, shape) in file.listing.items():
        stem, _, suffix = key.partition(".")
        layers.setdefault(stem, {})[suffix] = shape
    found = set()
    for stem, tensors in layers.items():
        # the whole denoiser is a layer of this name
        if stem == "diffusion_model" or (stem in keys and not _known(set(tensors))):
            raise RefusedError(f"no kind of module has {sorted(tensors)[:3]}")
        part = stems.get(stem)
        if stem in keys and part is not None and same(part, keys[stem]) and right(part, tensors):
            found.add(stem)
    return Loaded(frozenset(found))


def _known(suffixes: set[str]) -> bool:
    return any(set(names) <= suffixes for names in KINDS)
