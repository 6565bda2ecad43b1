"""Forge's LoRA loader in our own words: ComfyUI's of 2024, with names of its own for T5, and a limit.

Read in lllyasviel/stable-diffusion-webui-forge at dfdcbab (2025-06-26), its last commit but one:
`packages_3rdparty/comfyui_lora_collection/lora.py`, `utils.py`, `backend/patcher/lora.py`,
`extensions-builtin/sd_forge_lora/networks.py`, `backend/loader.py`, `backend/diffusion_engine/*`.

The names of the models' weights are those in ComfyUI. More than twelve keys that no weight is found for, and nothing of
the file is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from adaptkit.hosts.contract import UNETS
from tests.interop.hosts import comfyui
from tests.interop.hosts.comfyui import MODEL, memory
from tests.interop.hosts.files import File, Part
from tests.interop.hosts.loaded import Loaded, Place, RefusedError, same

VERSION = "dfdcbab"
DATE = "2025-06"
SPARE = 12

FACTORS = (
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    *(names for names in comfyui.READS if not names[0].startswith("lora")),
)
ALWAYS = ("alpha", "dora_scale")


@cache
def key_map(family: str) -> Mapping[str, Place]:
    """Every stem that the loader looks for, and where it leads."""
    denoiser, text = memory(family)
    found: dict[str, Place] = {}
    for name, place in denoiser.places.items():
        found[f"lora_unet_{name.replace('.', '_')}"] = place
        found[MODEL + name] = place
    if family in UNETS:
        found.update(comfyui._diffusers(family))
    elif family == "flux":
        for stem, place in comfyui._diffusers(family):
            if stem.startswith(("transformer.", "lycoris_", "lora_transformer_")):
                found[stem] = place
    found.update(_text(family, text.places))
    return found


def _text(family: str, places: Mapping[str, Place]) -> Iterator[tuple[str, Place]]:
    for stem, place in comfyui._text(family, memory(family)[1]):
        if not stem.startswith("text_encoders."):
            yield stem, place
    for name, place in places.items():
        encoder, _, module = name.partition(".transformer.")
        if encoder == "t5xxl":
            for number in (1, 2, 3):
                yield f"lora_te{number}_{module.replace('.', '_')}", place
        elif name == "clip_g.transformer.text_projection":
            yield "text_encoder.text_projection", place


def looked_for(suffixes: set[str]) -> set[str]:
    """The tensors that it takes of a module whose stem it knows."""
    return {s for s in suffixes if s in ALWAYS or any(s in names for names in FACTORS)}


def right(part: Part, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether what is computed of these tensors is what was meant: as in ComfyUI."""
    return comfyui.right(part, tensors)


def load(file: File) -> Loaded:
    """What Forge loads of a file."""
    loaded, left = _loaded(file)
    if left > SPARE:
        raise RefusedError(f"{left} keys have no place")
    return loaded


def places(file: File) -> Loaded:
    """The modules of a file that it finds a place for, however many others there are."""
    return _loaded(file)[0]


def _loaded(file: File) -> tuple[Loaded, int]:
    """The modules that are loaded right, and the number of keys without a place."""
    if file.metadata.get("lora_adapter_metadata"):
        raise RefusedError("alpha in metadata is not read")
    listing, keys = file.listing, key_map(file.family)
    stems = {part.stem: part for part in file.parts}
    control = "img_in.lora_A.weight" in listing and "single_blocks.0.norm.key_norm.scale" in listing
    by_stem: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (_, shape) in listing.items():
        stem = next(s for s in comfyui._stems(key) if s in stems)
        by_stem.setdefault(stem, {})[key.removeprefix(f"{stem}.")] = shape
    found, left = set(), 0
    for stem, tensors in by_stem.items():
        place, suffixes = keys.get(MODEL + stem if control else stem), set(tensors)
        if stem.endswith("_lora") and suffixes == {"up.weight", "down.weight"}:
            place = keys.get(stem.removesuffix("_lora"))
            rest = suffixes if place is None else set()
        else:
            rest = suffixes if place is None else suffixes - looked_for(suffixes)
        left += len(rest)
        if "lokr_t2" in tensors and place is not None:
            raise RefusedError("the product of a Tucker core fails")
        here = place is not None and same(stems[stem], place)
        if here and not rest and right(stems[stem], tensors):
            found.add(stem)
    return Loaded(frozenset(found)), left
