"""How every key format names a module, and what its readers make of a file: a grammar of its own,
both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from tests.matrix import algebra
from tests.matrix.algebra import Module
from tests.matrix.layers import COMFY_TE, LAYERS, UNETS, Layer, Part
from tests.matrix.st import File

Array = np.ndarray
Place = tuple[Layer, Part | None]  # None: the whole layer, rows as the original checkpoint has them

FORMATS = (
    "kohya", "lycoris", "diffusers", "peft", "comfy", "onetrainer", "bare", "diffusers-old",
    "xlabs", "omi", "kohya-oft",
)  # fmt: skip
A_B = ("diffusers", "peft", "comfy", "bare")  # spell LoRA as lora_A, lora_B
KOHYA_BY_DIFFUSERS = ("sd1", "z-image")  # kohya's names there are those of diffusers
TENSOR_ALPHA = ("kohya", "lycoris", "onetrainer", "omi", "comfy", "bare", "kohya-oft")
ALIASES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "down.weight": "lora_down.weight",
    "up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}
ROLES = {
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha", "diff",
    "diff_b",
    "lora_B.bias", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "a1.weight",
    "a2.weight",
    "b1.weight", "b2.weight", "oft_blocks", "oft_blocks.0", "oft_blocks.1", "oft_blocks.2",
    "oft_blocks.3", "rescale", "weight", "on_input", "oft_R.weight", "set_weight",
    "boft_R", "boft_s", "ia3_l", "hira_A", "hira_B", "lora_A", "lora_B", "lora_E",
}  # fmt: skip


def component(family: str, layer: Layer) -> str:
    return layer.component or ("unet" if family in UNETS else "transformer")


def _prefixes(family: str, format: str, layer: Layer) -> tuple[str, ...]:
    """What may stand before the module's name; none where the format has no place for the
    component.
    """
    te = layer.component
    number = {"text_encoder": "1", "text_encoder_2": "2"}.get(te, "")
    if format == "kohya":
        if not te:
            return ("lora_unet_",)
        return ("lora_te_",) if family == "sd1" else (f"lora_te{number}_",)
    if format == "kohya-oft":
        return () if te else ("oft_unet_",)
    if format == "onetrainer":
        if family in UNETS:
            return ()
        return (f"lora_te{number}_",) if te else ("lora_transformer_",)
    if format == "comfy":
        return (f"text_encoders.{COMFY_TE[te]}.transformer.",) if te else ("diffusion_model.",)
    if format in ("diffusers", "diffusers-old"):
        return (component(family, layer) + ".",)
    if te:
        return ()
    return {
        "lycoris": ("lycoris_",),
        "peft": ("base_model.model.",),
        "bare": ("",),
        "xlabs": ("",),
        "omi": ("transformer.",),
    }[format]


def _named(layer: Layer, naming: str) -> Iterator[tuple[str, Part | None]]:
    if naming == "native":
        yield layer.name, None
    elif naming == "comfy":
        yield layer.comfy or layer.name, None
    else:
        for part in layer.parts:
            yield part.name, part


def _namings(family: str, format: str, layer: Layer) -> tuple[str, ...]:
    """The namings that readers of a format know, the usual one first. Text encoders: always Hugging
    Face's.
    """
    if layer.component:
        return ("diffusers",)
    if format in ("kohya", "kohya-oft"):
        usual = "diffusers" if family in KOHYA_BY_DIFFUSERS else "native"
        both = family in ("sdxl", "z-image", *("sd1",))
        return (usual, "native" if usual == "diffusers" else "diffusers") if both else (usual,)
    if format == "comfy":
        return ("comfy",)
    if format == "bare":
        return ("native", "diffusers", "comfy")
    return ("diffusers",)


def _old(name: str) -> str | None:
    """`…attn1.to_q` -> `…attn1.processor.to_q_lora`: attention only; `q_proj` of a text encoder ->
    `to_q_lora`.
    """
    if found := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
        return f"{found[1]}.to_{found[2]}_lora"
    found = re.fullmatch(r"(.*\.attn\d)\.(to_q|to_k|to_v|to_out)(?:\.0)?", name)
    return f"{found[1]}.processor.{found[2]}_lora" if found else None


def _xlabs(name: str) -> str | None:
    found = re.fullmatch(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)", name)
    return f"{found[1]}.processor.{found[3]}_lora{1 if found[2] == 'img' else 2}" if found else None


def _omi(layer: Layer) -> Iterator[tuple[str, Part | None]]:
    if len(layer.parts) == 1:
        yield layer.name, None
    else:
        for n, part in enumerate(layer.parts):
            yield f"{layer.name}.{n}", part


def _stems(
    family: str, format: str, layer: Layer, naming: str
) -> Iterator[tuple[str, Part | None]]:
    for prefix in _prefixes(family, format, layer):
        if format == "diffusers-old":
            for name, part in _named(layer, "diffusers"):
                if old := _old(name):
                    yield prefix + old, part
        elif format == "xlabs":
            if name := _xlabs(layer.name):
                yield prefix + name, None
        elif format == "omi":
            for name, part in _omi(layer):
                yield prefix + name, part
        else:
            flat = format in ("kohya", "lycoris", "onetrainer", "kohya-oft")
            for name, part in _named(layer, naming):
                yield prefix + (name.replace(".", "_") if flat else name), part


def places(
    family: str, format: str, layer: Layer, naming: str = ""
) -> list[tuple[str, Part | None]]:
    """(stem, part) of every module that holds a layer in a format; none if it has no place there."""
    usual = naming or _namings(family, format, layer)[0]
    return list(_stems(family, format, layer, usual))


@cache
def _index(family: str, format: str) -> dict[str, Place]:
    """Every stem that a reader of the format knows."""
    index: dict[str, Place] = {}
    for layer in LAYERS[family]:
        for naming in reversed(_namings(family, format, layer)):
            for stem, part in _stems(family, format, layer, naming):
                index[stem] = (layer, part)
    return index


@dataclass
class Content:
    """What a reader makes of a file: modules by stem, and the keys that it knows nothing of."""

    modules: dict[str, tuple[Layer, Part | None, Module]] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)


def _split(key: str, index: dict[str, Place]) -> tuple[str, str] | None:
    key = key.replace(".default.", ".")
    for at in (found.start() for found in re.finditer(r"\.", key)):
        stem, suffix = key[:at], key[at + 1 :]
        if stem in index and ALIASES.get(suffix, suffix) in ROLES:
            return stem, ALIASES.get(suffix, suffix)
    return None


def _matched(patterns: dict[str, float], name: str, default: float | None) -> float | None:
    """PEFT: the first pattern that the module's name ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _configured(module: Module, config: dict, name: str) -> None:
    """Alpha and rank as PEFT takes them from a configuration; what the tensors say does not count."""
    key = "lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha"
    if config.get("peft_type") == "ADALORA":
        module.alpha, module.rank = config["lora_alpha"], config["init_r"]
        return
    module.alpha = _matched(config.get("alpha_pattern") or {}, name, config.get(key, 8))
    rank = _matched(config.get("rank_pattern") or {}, name, config.get("r", 8))
    module.rank = int(rank) if rank else None
    module.root = bool(config.get("use_rslora"))
    module.always = config.get("peft_type") == "LOKR"


def _header(file: File, part: str) -> dict:
    """`lora_adapter_metadata` of one component, as diffusers reads it."""
    whole = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    return {k.removeprefix(part + "."): v for k, v in whole.items() if k.startswith(part + ".")}


def content(file: File, family: str, format: str) -> Content:
    """The modules of a file, as readers of `format` understand it."""
    index, found = _index(family, format), Content()
    stems: dict[str, dict[str, Array]] = {}
    for key, value in file.tensors.items():
        split = _split(key, index)
        if split is None:
            found.strange.append(key)
        else:
            outputs = (
                "lora_magnitude_vector" in key
            )  # PEFT: always the outputs, [o] or [1, o, 1, 1]
            shape = (-1, *[1] * max(value.ndim - 1, 1)) if outputs else value.shape
            stems.setdefault(split[0], {})[split[1]] = value.reshape(shape)
    for stem, roles in stems.items():
        layer, part = index[stem]
        module = Module(roles, kohya=format == "kohya-oft")
        alpha = roles.pop("alpha", None)
        if alpha is not None:
            module.alpha = float(alpha.reshape(-1)[0])
            scale = not any("oft_" in role for role in roles)  # of an OFT it is a bound
            if format not in TENSOR_ALPHA and scale:
                found.strange.append(stem + ".alpha")
        if format == "peft":
            _configured(module, file.config, stem.removeprefix("base_model.model."))
        elif format == "diffusers":
            prefix = component(family, layer)
            if header := _header(file, prefix):
                _configured(module, header, stem.removeprefix(prefix + "."))
        plain, scaled = roles.pop("diff_b", None), roles.pop("lora_B.bias", None)
        if plain is not None:
            module.bias = plain
        if scaled is not None:
            module.bias = scaled * algebra.bias_scale(module)
        found.modules[stem] = (layer, part, module)
    return found


def exchange(value: Array) -> Array:
    """Rows with their halves exchanged: scale, shift for shift, scale."""
    half = len(value) // 2
    return np.concatenate([value[half:], value[:half]])


Effect = dict[str, Array]  # by the weight's original name; biases under name + "|bias"


def effect(
    modules: Iterable[tuple[Layer, Part | None, Module]],
    base: dict[str, Array],
    *,
    merged: bool = False,
) -> Effect:
    """W' − W of every original weight that the modules touch, and b' − b of the biases.

    `merged`: also of biases that change with their weight, which only a merge adds.
    """
    found: Effect = {}
    for layer, part, module in modules:
        name = layer.component + layer.name
        weight = base[name]
        start, stop = (part.start, part.stop) if part else (0, layer.rows)
        swapped = part is not None and part.swapped
        piece = weight[start:stop]
        if module.roles:
            seen = exchange(piece) if swapped else piece
            change = algebra.merged(module, seen) - seen
            change = exchange(change) if swapped else change
            found.setdefault(name, np.zeros(weight.shape))[start:stop] += change
        factor = module.roles.get("ia3_l") if merged and name + "|bias" in base else None
        if factor is not None and factor.shape[0] > 1:  # PEFT multiplies the output, bias and all
            rest = (exchange(factor) if swapped else factor).reshape(-1) - 1
            found.setdefault(name + "|bias", np.zeros(layer.rows))[start:stop] += (
                rest * base[name + "|bias"].reshape(-1)[start:stop]
            )
        if module.bias is not None:
            bias = module.bias.reshape(-1)
            bias = exchange(bias) if swapped else bias
            found.setdefault(name + "|bias", np.zeros(layer.rows))[start:stop] += bias
    return found
