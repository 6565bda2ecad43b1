"""InvokeAI's LoRA loader in our own words: how it recognises a file, and where each layer goes.

Read in invoke-ai/InvokeAI at 8e71a8a (2026-08-19): `backend/model_manager/configs/lora.py`,
`backend/model_manager/util/model_util.py`, `backend/patches/lora_conversions/*`, `backend/patches/layers/*`,
`backend/patches/layer_patcher.py`. An installation first recognises the base model of a file by its keys; a converter
of that base model then renames the layers, and each is looked up in the model when it is applied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.names import Rows, Target
from tests.interop.hosts.files import File, Part
from tests.interop.hosts.invokeai_files import WAN, Z_KOHYA, Shape, recognised
from tests.interop.hosts.invokeai_flux import flux
from tests.interop.hosts.invokeai_layers import (
    LAYER_SUFFIXES,
    Converted,
    at_first_dot,
    grouped,
    kind,
    memory,
    renamed,
    right,
)
from tests.interop.hosts.loaded import Loaded, Place, RefusedError, same
from tests.synth import expand, fill

VERSION = "8e71a8a"
DATE = "2026-08"

# the text encoders that it applies adapters to
TEXT = {
    "sd1": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}

# ------------------------------------------------------------------ converters: layer -> module of the model


def _convert(file: File, keys: Mapping[str, Shape]) -> Converted:
    family = file.family
    if family in TEXT:
        yield from _unet(family, keys)
    elif family in ("flux", "flux2"):
        yield from flux(family, keys)
    elif family == "z-image":
        yield from _z_image(keys)
    elif family == "qwen-image":
        yield from _qwen(keys)
    elif family == "wan":
        yield from _wan(keys)
    elif family == "anima":
        yield from _anima(keys)
    else:
        yield from _krea(keys)


def _unet(family: str, keys: Mapping[str, Shape]) -> Converted:
    unet, native = memory(family, "unet"), _native_unet(family)
    joined = {name.replace(".", "_"): name for name in unet.places}
    heads = ("lora_unet_", *TEXT[family].values()) if family == "sdxl" else ("",)
    layers = at_first_dot(keys)
    converted = kept = 0
    for stem, tensors in layers.items():
        if not stem.startswith(heads):
            raise RefusedError(f"an SDXL key begins with {stem[:12]}")
        if stem.startswith("lora_unet_"):
            name = stem.removeprefix("lora_unet_")
            if family == "sdxl" and (
                known := next((n for n in native if name.startswith(n)), None)
            ):
                # a stem is renamed by its block; the rest of the name stays
                name, converted = native[known] + name[len(known) :], converted + 1
            else:
                kept += 1
            if name in joined:
                yield stem, "unet", joined[name], tensors
            else:
                kind(tensors)
        else:
            kind(tensors)
            for component, head in TEXT[family].items():
                if stem.startswith(head):
                    text = memory(family, component)
                    names = {n.replace(".", "_"): n for n in text.places}
                    if (name := stem.removeprefix(head)) in names:
                        yield stem, component, names[name], tensors
    if family == "sdxl" and converted and kept:
        raise RefusedError("an SDXL file is converted only in part")


@cache
def _native_unet(family: str) -> dict[str, str]:
    """The original names of SDXL's modules, and what they are called in diffusers; both joined."""
    found = {}
    for row in families()[family].component("unet").rows:
        for indices in expand(row):
            theirs = fill(row.names["diffusers"][0].module, indices).replace(".", "_")
            for name in row.names.get("native", ()):
                found[fill(name.module, indices).replace(".", "_")] = theirs
    # longest first, as a name may begin with another's
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _stripped(layer: str, *prefixes: str) -> str:
    prefix = next((p for p in prefixes if layer.startswith(p)), "")
    return layer[len(prefix) :]


TEXT_HEADS = ("base_model.model.text_encoder.", "text_encoder.")


def _z_image(keys: Mapping[str, Shape]) -> Converted:
    for layer, tensors in grouped(keys).items():
        named = renamed(tensors)
        kind(named)
        if layer.startswith(TEXT_HEADS):
            # the encoder is a causal model: its layers stand under `model.`
            continue
        hit = re.fullmatch(Z_KOHYA, layer)
        module = _stripped(
            layer,
            "base_model.model.transformer.diffusion_model.", "base_model.model.transformer.",
            "transformer.diffusion_model.", "transformer.", "diffusion_model.",
        )  # fmt: skip
        yield layer, "transformer", ".".join(hit.groups()) if hit else module, named


def _qwen(keys: Mapping[str, Shape]) -> Converted:
    if any(key.startswith("lora_unet_transformer_blocks_") for key in keys):
        names = {
            f"lora_unet_{n.replace('.', '_')}": n
            for n in memory("qwen-image", "transformer").places
            if n.startswith("transformer_blocks.")
        }
        for stem, tensors in at_first_dot(keys).items():
            if stem in names:
                kind(tensors)
                yield stem, "transformer", names[stem], tensors
        return
    for layer, tensors in grouped(keys).items():
        named = renamed(tensors)
        kind(named)
        yield layer, "transformer", _stripped(layer, "transformer."), named


WAN_NATIVE = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def _wan_module(path: str) -> str:
    """A block's module in diffusers' names, whose own names stay as they are."""
    if re.search(r"attn[12]\.|ffn\.net\.", path):
        return path
    path = path.replace("cross_attn.", "attn2.").replace("self_attn.", "attn1.")
    head, _, last = path.rpartition(".")
    path = f"{head}.{WAN_NATIVE.get(last, last)}"
    return re.sub(r"ffn\.0$", "ffn.net.0.proj", re.sub(r"ffn\.2$", "ffn.net.2", path))


def _wan(keys: Mapping[str, Shape]) -> Converted:
    kohya = any(re.search(WAN.pattern.split("|(^|")[0], key) for key in keys)
    names = {}
    for native in ("self_attn", "cross_attn"):
        diffusers = "attn1" if native == "self_attn" else "attn2"
        for short, long in WAN_NATIVE.items():
            names[f"{native}_{short}"] = names[f"{diffusers}_{long.replace('.', '_')}"] = (
                f"{diffusers}.{long}"
            )
    names |= {"ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2", "ffn_net_0_proj": "ffn.net.0.proj", "ffn_net_2": "ffn.net.2"}  # fmt: skip
    for layer, tensors in grouped(keys).items():
        if kohya:
            hit = re.match(r"lora_unet_blocks_(\d+)_(.*)", layer)
            module = f"blocks.{hit[1]}.{names[hit[2]]}" if hit and hit[2] in names else ""
        else:
            path = _stripped(
                layer, "base_model.model.transformer.", "transformer.", "diffusion_model."
            )
            module = _wan_module(path) if path.startswith("blocks.") else ""
        if module:
            named = renamed(tensors, "alpha", "dora_scale")
            kind(named)
            yield layer, "transformer", module, named


def _anima(keys: Mapping[str, Shape]) -> Converted:
    kohya = any(key.startswith(("lora_unet_", "lora_te_")) for key in keys)
    # below an index, two words of a module are told apart only where its list has them
    blocks = {
        n.replace(".", "_"): n
        for n in (*_anima_names("transformer"), *_anima_names("text_conditioner"))
        if re.match(r"blocks\.\d+\.(adaln_modulation_|cross_attn\.\w+_proj|self_attn\.\w+_proj|mlp\.layer)", n)
    }  # fmt: skip
    more = (
        ()
        if kohya
        else tuple(f".lokr_{role}" for role in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b"))
    )
    for layer, tensors in grouped(keys, *more).items():
        if kohya and layer.startswith("lora_te_"):
            names = {n.replace(".", "_"): n for n in memory("anima", "text_encoder").places}
            component, module = "text_encoder", names.get(layer.removeprefix("lora_te_"), layer)
            named = dict(tensors)
        elif kohya:
            path = layer.removeprefix("lora_unet_")
            component = "text_conditioner" if path.startswith("llm_adapter_") else "transformer"
            module, named = blocks.get(path.removeprefix("llm_adapter_"), layer), dict(tensors)
            if component == "transformer" and path in _anima_names("transformer"):
                module = path  # a name of one word needs no dots
        else:
            named = renamed(tensors)
            component = "transformer"
            module = _stripped(
                layer, "base_model.model.transformer.", "transformer.", "diffusion_model."
            )
            if layer.startswith(TEXT_HEADS):
                component, module = "text_encoder", f"not under model.: {layer}"
            if module.startswith("llm_adapter."):
                component, module = "text_conditioner", module.removeprefix("llm_adapter.")
        if "dora_scale" in named and {"lokr_w1", "lokr_w1_a"} & set(named):
            named.pop("dora_scale")
        kind(named)
        yield layer, component, module, named


@cache
def _anima_names(component: str) -> frozenset[str]:
    return frozenset(memory("anima", component).places)


KREA_TOP = {
    "first": "img_in", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2", "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1", "txtmlp.3": "txt_in.linear_2", "last.linear": "final_layer.linear",
}  # fmt: skip
KREA_LEAF = {
    "attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down",
}  # fmt: skip


def _krea_module(path: str) -> str:
    if path in KREA_TOP:
        return KREA_TOP[path]
    if path.startswith("txtfusion."):
        path = "text_fusion." + path.removeprefix("txtfusion.")
    path = re.sub(r"^blocks\.", "transformer_blocks.", path)
    for old, new in KREA_LEAF.items():
        if path.endswith(f".{old}"):
            return path.removesuffix(old) + new
    return path


def _krea(keys: Mapping[str, Shape]) -> Converted:
    native = {
        f"lora_unet_{fill(name.module, indices).replace('.', '_')}": fill(name.module, indices)
        for row in families()["krea2"].components[0].rows
        for indices in expand(row)
        for name in row.names["native"]
    }
    for layer, tensors in grouped(keys, ".lora_magnitude_vector.weight").items():
        path = _stripped(layer, "base_model.model.transformer.", "transformer.", "diffusion_model.")
        named = renamed(tensors, "alpha", "dora_scale")
        kind(named)
        # underscored names are read of plain and decomposed LoRAs only
        if layer in native and all(f".{name}" in LAYER_SUFFIXES for name in tensors):
            path = native[layer]
        yield layer, "transformer", _krea_module(path), named


# ------------------------------------------------------------------ loading


def load(file: File) -> Loaded:
    """What InvokeAI loads of a file."""
    keys = {key: shape for key, (_, shape) in file.listing.items()}
    if not recognised(file.family, keys):
        raise RefusedError("it does not recognise such a file")
    meant: dict[str, dict[str, Shape]] = {}
    stems = {part.stem: part for part in file.parts}
    for part in file.parts:
        meant[part.stem] = dict(file.form.tensors(part.shape))
        if file.form.alpha is not None:
            meant[part.stem]["alpha"] = ()
    found = set()
    for stem, component, module, tensors in _convert(file, keys):
        part = stems.get(stem)
        if part is None or part.slot.component != component:
            continue
        place = _place(file.family, component, module, part)
        if place is not None and same(part, place) and right(part, tensors, meant[stem]):
            found.add(stem)
    return Loaded(frozenset(found))


def _place(family: str, component: str, module: str, part: Part) -> Place | None:
    names = memory(family, component)
    if module.startswith("qkv:"):  # a fused layer, split where diffusers' has three
        _, side, index = module.split(":")
        target = Target("transformer", f"double_blocks.{index}.{side}_attn.qkv")
        return Place(target)
    module, _, piece = module.partition("|")
    place = names.places.get(module)
    if place is None or not piece:
        return place
    if piece.startswith("rows "):
        first = int(piece.split()[1])
        total = 7 if module.endswith("linear1") else 3
        return Place(place.target, Rows(first, total if first == 3 else first + 1, total))
    # a part of a layer that is fused here
    parts = families()[family].component(component)
    for row in parts.rows:
        if row.kind is Kind.MATRIX:
            for indices in expand(row):
                if fill(row.target, indices) == place.target.module:
                    for name in row.names["diffusers"]:
                        if fill(name.module, indices) == piece.removeprefix("transformer."):
                            return Place(place.target, name.rows)
    return None
