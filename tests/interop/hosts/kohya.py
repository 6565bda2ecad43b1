"""The loaders of kohya's tools in our own words: sd-scripts' networks and musubi-tuner's merge while loading.

Read in kohya-ss/sd-scripts at 48d368f (2026-02-16): `networks/lora.py`, `lora_flux.py`, `lora_sd3.py`, `lora_lumina.py`,
`lora_anima.py`, `lora_hunyuan_image.py`, `oft.py`, `oft_flux.py`; and in kohya-ss/musubi-tuner at 30c658c (2026-06-24):
`utils/lora_utils.py`, `networks/lora.py`, `lora_kandinsky.py`, `loha.py`, `lokr.py`, `kandinsky5_generate_video.py`.

sd-scripts builds a network of the layers inside certain classes and loads the file into it, silently without the rest.
musubi-tuner looks up `lora_unet_` and the joined name of every weight of the transformer; of Kandinsky 5 it builds a network
as sd-scripts does, of plain LoRAs, and stops at one without alpha.
"""

from __future__ import annotations

import re

from adaptkit.detect import families
from tests.interop.hosts.files import File, Part, is_denoiser
from tests.interop.hosts.loaded import Loaded, RefusedError

VERSION = "sd-scripts 48d368f, musubi-tuner 30c658c"
DATE = "2026-06"

# the classes whose layers sd-scripts adapts, as patterns of our targets
SCRIPTS = {
    **dict.fromkeys(
        ("sd1", "sd2", "sdxl"),
        r"attentions\.|resnets\.(?!.*norm)|downsamplers|upsamplers",
    ),
    # six layers outside its blocks have ranks of their own
    **dict.fromkeys(
        ("sd3", "sd35-large"), r"joint_blocks|context_embedder|[txy]_embedder|final_layer"
    ),
    "flux": r"double_blocks|single_blocks|(img|time|vector|guidance|txt)_in(\.|$)",
    "chroma": r"double_blocks|single_blocks",
    "lumina2": r"layers\.|refiner\.|final_layer",
    "anima": r"blocks\.|x_embedder|t_embedder|final_layer",
    "hunyuan-image": r"double_blocks|single_blocks",
    "kandinsky5": r"transformer_blocks",
}
# prefixes of the text encoders that it trains, and their layers
THREE = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
TEXT = {
    "sd1": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "sd3": THREE,
    "sd35-large": THREE,
    "flux": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    "chroma": {"text_encoder": "lora_te3_"},
    "lumina2": {"text_encoder": "lora_te_"},
    "anima": {"text_encoder": "lora_te_", "text_conditioner": "lora_unet_llm_adapter_"},
}
LAYERS = r"self_attn|mlp\.|Attention\.|DenseReluDense|cross_attn"
MUSUBI = (
    "flux", "flux2", "hunyuan-video", "framepack", "hunyuan-video-15", "qwen-image", "wan", "z-image", "krea2",
    "ideogram4",
)  # fmt: skip
# the names of the weights, where they are not those of the original model
DIFFUSERS = ("sd1", "sd2", "framepack", "qwen-image", "z-image", "kandinsky5")


def _named(file: File, part: Part) -> bool:
    """Whether the model has a layer of the module's name."""
    rows = families()[file.family].component(part.slot.component).rows
    naming = (
        "diffusers"
        if file.family in DIFFUSERS or not is_denoiser(part.slot.component)
        else "native"
    )
    return any(
        part.name.replace(".", "_") == name.module.replace(".", "_")
        for row in rows
        for name in row.names.get(naming) or row.names["diffusers"]
    )


def load(file: File) -> Loaded:
    """What the tool that knows a file's family and algorithm loads of it."""
    suffixes = {key.removeprefix(f"{part.stem}.") for part in file.parts[:1] for key in file.form.tensors(part.shape)}  # fmt: skip
    plain = suffixes == {"lora_up.weight", "lora_down.weight"}
    if file.family == "kandinsky5" and file.form.alpha is None and plain:
        raise RefusedError("KeyError: the alpha of a module")
    oft = suffixes == {"oft_blocks"}
    if oft:
        return Loaded(frozenset(part.stem for part in file.parts if _oft(file, part)))
    found = set()
    for part in file.parts:
        if (file.family in SCRIPTS and plain and _scripts(file, part)) or (
            file.family in MUSUBI
            and (file.family not in SCRIPTS or not plain)
            and _musubi(file, part, suffixes)
        ):
            found.add(part.stem)
    return Loaded(frozenset(found))


def _scripts(file: File, part: Part) -> bool:
    target = part.slot.target
    if is_denoiser(target.component):
        inside = re.search(SCRIPTS[file.family], target.module) is not None
        return inside and part.stem.startswith("lora_unet_") and _named(file, part)
    prefix = TEXT.get(file.family, {}).get(target.component)
    inside = re.search(LAYERS, target.module) is not None
    return inside and prefix is not None and part.stem.startswith(prefix)


def _musubi(file: File, part: Part, suffixes: set[str]) -> bool:
    if not is_denoiser(part.slot.component) or not part.stem.startswith("lora_unet_"):
        return False
    if not _named(file, part):
        return False
    # FLUX.1 has two tools: layers that one of them drops count as dropped
    if file.family == "flux" and not re.search(SCRIPTS["flux"], part.slot.target.module):
        return False
    if suffixes == {"lora_up.weight", "lora_down.weight"}:
        # its merge permutes four dimensions; the network of its trainer leaves them out
        return len(part.shape) != 5
    if {"hada_w1_a", "lokr_w1"} & suffixes and not {"hada_t1", "lokr_t2", "dora_scale"} & suffixes:
        return len(part.shape) == 2
    return False


def _oft(file: File, part: Part) -> bool:
    if file.family == "sdxl":
        where = r"attentions\."
    elif file.family == "flux":
        where = r"double_blocks|single_blocks"
    else:
        return False
    module = part.slot.target.module
    return (
        is_denoiser(part.slot.component)
        and part.stem.startswith("oft_unet_")
        and re.search(where, module) is not None
        and _named(file, part)
    )
