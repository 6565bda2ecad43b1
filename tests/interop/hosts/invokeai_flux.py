"""InvokeAI's converters of FLUX.1 and FLUX.2 files, in our own words; see `invokeai`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from adaptkit.detect import families
from tests.interop.hosts.invokeai_files import BFL, Shape, flux_format
from tests.interop.hosts.invokeai_layers import (
    Converted,
    Layers,
    at_first_dot,
    grouped,
    kind,
    memory,
    renamed,
)
from tests.interop.hosts.loaded import RefusedError
from tests.synth import expand, fill

DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
}  # fmt: skip
SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
}


def _as_flux2(module: str, form: str, split: tuple[str, ...]) -> str:
    """A name of black-forest-labs' FLUX.2 in diffusers, where the model is; q, k and v of some layers are split."""
    block = re.match(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if not block:
        return OUTER.get(module, module)
    run, index, rest = block.groups()
    if run == "single":
        return f"single_transformer_blocks.{index}.{SINGLE.get(rest, rest)}"
    if rest in ("img_attn.qkv", "txt_attn.qkv"):
        return f"qkv:{rest[:3]}:{index}" if form in split else "not split"
    return f"transformer_blocks.{index}.{DOUBLE.get(rest, rest)}"


def flux(family: str, keys: Mapping[str, Shape]) -> Converted:
    found = flux_format(keys)
    two = family == "flux2"
    if found == "diffusers":
        yield from _flux_diffusers(two, keys)
    elif found == "kohya":
        for stem, tensors in at_first_dot(keys).items():
            form = kind(tensors)
            if stem.startswith("lora_unet_final_layer"):
                continue
            if stem.startswith("lora_te"):
                yield stem, *_flux_text(stem), tensors
                continue
            hit = re.match(r"lora_unet_(\w+_blocks)_(\d+)_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)_?(.*)", stem)  # fmt: skip
            if hit is None:
                raise RefusedError(f"no FLUX layer: {stem}")
            module = ".".join(word for word in hit.groups() if word)
            yield (
                stem,
                "transformer",
                _as_flux2(module, form, ("lora",)) if two else module,
                tensors,
            )
    elif found == "onetrainer":
        yield from _flux_onetrainer(keys)
    elif found == "onetrainer-bfl":
        # OneTrainer's parts of a fused layer stay apart, each at its rows
        for layer, tensors in grouped(keys).items():
            kind(tensors)
            module = layer.removeprefix("transformer.")
            hit = re.fullmatch(r"(.*\.qkv|.*\.linear1)\.(\d)", module)
            yield layer, "transformer", f"{hit[1]}|rows {hit[2]}" if hit else module, tensors
    elif found == "aitoolkit":
        for layer, tensors in grouped(keys, plain=True).items():
            named = {k.replace("lora_A.", "lora_down.").replace("lora_B.", "lora_up."): s for k, s in tensors.items()}  # fmt: skip
            form = kind(named)
            if layer.startswith("diffusion_model."):
                module = layer.removeprefix("diffusion_model.")
                yield (
                    layer,
                    "transformer",
                    _as_flux2(module, form, ("lora",)) if two else module,
                    named,
                )
    elif found == "bfl":
        layers: dict[str, dict[str, Shape]] = {}
        for key, shape in keys.items():
            words = key.rsplit(".", maxsplit=2 if key.endswith(".weight") else 1)
            layers.setdefault(words[0], {})[".".join(words[1:])] = shape
        for layer, tensors in layers.items():
            named = renamed(tensors, "alpha", "dora_scale")
            form = kind(named)
            module = layer
            for prefix in BFL:
                module = module.removeprefix(prefix)
            yield (
                layer,
                "transformer",
                _as_flux2(module, form, ("lora", "lokr")) if two else module,
                named,
            )
    elif found == "control":
        for layer, tensors in _control_layers(keys).items():
            yield layer, "transformer", layer, tensors
    elif found == "xlabs":
        for layer, tensors in grouped(keys, plain=True).items():
            hit = re.match(r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12])", layer)
            if hit is None:
                raise RefusedError(f"no XLabs layer: {layer}")
            side = "img" if hit[3] == "1" else "txt"
            named = {f"lora_{name}": shape for name, shape in tensors.items()}
            yield layer, "transformer", f"double_blocks.{hit[1]}.{side}_attn.{hit[2]}", named


def _control_layers(keys: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    found: dict[str, dict[str, Shape]] = {}
    for key, shape in keys.items():
        stem, _, name = key.rpartition(".")
        if name != "scale":
            stem, _, half = stem.rpartition(".")
            name = f"{half}.{name}"
        if name == "lora_B.bias":
            continue
        found.setdefault(stem, {})[
            name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        ] = shape
    return found


def _flux_text(stem: str) -> tuple[str, str]:
    head, component = ("lora_te1_", "text_encoder") if stem.startswith("lora_te1") else ("lora_te2_", "text_encoder_2")  # fmt: skip
    names = {name.replace(".", "_"): name for name in memory("flux", component).places}
    return component, names.get(stem.removeprefix(head), stem)


# diffusers' names of FLUX.1 that its converter takes, and the layer each becomes part of
FLUX1 = {
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"time_text_embed\.guidance_embedder\.linear_[12]": "guidance_in",  # no layer with a weight
    r"context_embedder": "txt_in",
    r"x_embedder": "img_in",
    r"proj_out": "final_layer.linear",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
    r"transformer_blocks\.(\d+)\.attn\.to_[qkv]": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
    r"single_transformer_blocks\.(\d+)\.attn\.to_[qkv]": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.proj_mlp": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
}
SHARES = {"q": 0, "k": 1, "v": 2, "p": 3}


def _flux1_layers(layers: Layers) -> Converted:
    """Layers in diffusers' names of FLUX.1; the whole file must be used up."""
    seen: dict[str, set[str]] = {}
    for stem, (name, tensors) in {s: (_bare(s), t) for s, t in layers.items()}.items():
        module = next(
            (re.sub(p, new, name) for p, new in FLUX1.items() if re.fullmatch(p, name)), None
        )
        if module is None:
            raise RefusedError(f"{name} is left over")
        named = renamed(tensors)
        if "lora_A.weight" in tensors and len(tensors) != 2:
            raise RefusedError("tensors are left over")
        kind(named)
        if module.endswith("qkv"):
            seen.setdefault(module, set()).add(re.sub(r".*_([qkv])(_proj)?$", r"\1", name))
        # the parts of a fused layer stay apart, each at its rows
        yield stem, "transformer", f"{module}|{name}", named
    if any(parts != {"q", "k", "v"} for parts in seen.values()):
        raise RefusedError("q, k or v of a double block is missing")


def _bare(stem: str) -> str:
    return stem.removeprefix("base_model.model.").removeprefix("transformer.")


def _flux_diffusers(two: bool, keys: Mapping[str, Shape]) -> Converted:
    if not any(
        re.search(r"to_qkv_mlp_proj|ff\.linear_in|ff_context\.linear_in", key) for key in keys
    ):
        yield from _flux1_layers(grouped(keys, plain=True))
        return
    for layer, tensors in grouped(keys, ".lora.down.weight", ".lora.up.weight").items():
        named = renamed(tensors)
        if "lora.down.weight" in tensors:
            named = {
                "lora_down.weight": tensors["lora.down.weight"],
                "lora_up.weight": tensors["lora.up.weight"],
            }
        kind(named)
        yield layer, "transformer", _bare(layer), named


def _flux_onetrainer(keys: Mapping[str, Shape]) -> Converted:
    names = {f"lora_transformer_{n.replace('.', '_')}": n for n in _flux_names()}
    layers: dict[str, Mapping[str, Shape]] = {}
    stems: dict[str, str] = {}
    for stem, tensors in at_first_dot(keys).items():
        if stem.startswith("lora_te"):
            kind(tensors)
            yield stem, *_flux_text(stem), tensors
            continue
        # its tree of names has norms and gates of text under shorter names that it takes first
        if stem not in names or re.search(r"_norm1_context_|_ff_context_", stem):
            raise RefusedError(f"{stem} is not in its tree of names")
        layers[names[stem]], stems[names[stem]] = tensors, stem
    for name, component, module, tensors in _flux1_layers(layers):
        yield stems[name], component, module, tensors


@cache
def _flux_names() -> tuple[str, ...]:
    return tuple(
        fill(name.module, indices)
        for row in families()["flux"].components[0].rows
        for indices in expand(row)
        for name in row.names["diffusers"]
    )
