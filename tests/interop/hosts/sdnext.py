"""SD.Next's own LoRA loader, run: `modules/lora` and the loaders of its pipelines, on a model of few columns.

Stand-ins are its settings (at their defaults), its log, its devices and its reader of files, which hands over tensors.
What a layer adds is what its `network_calc_weights` gives for it. Models of which it has no loader of its own go to
diffusers' `load_lora_weights`, in a version of diffusers that it pins; they are not measured.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from adaptkit.detect import families
from tests.interop.hosts.added import Sum, layers, loaded, narrowed, on_probe, put, tensors_of
from tests.interop.hosts.diffusers import ABSENT as LACKING
from tests.interop.hosts.files import File
from tests.interop.hosts.loaded import Loaded, RefusedError
from tests.interop.hosts.sources import commit, tree

SOURCE = "vladmandic/sdnext"
DATE = "2026-07"
# what it calls a model, whose LoRAs its own loader reads
TYPES = {
    "sd1": "sd",
    "sd2": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35-large": "sd3",
    "flux": "f1",
    "flux2": "f2",
    "chroma": "chroma",
    "z-image": "zimage",
    "anima": "anima",
    "ernie-image": "ernieimage",
    "krea2": "krea2",
}
PIPELINES = ("anima", "chroma", "ernie", "flux", "krea2", "z_image")
# layers are named as in diffusers, but for its own class for Krea 2, and CLIP without a wrapper
NAMINGS = {("krea2", "transformer"): "native"}


def version() -> str:
    return commit(SOURCE)


@cache
def program() -> Any:
    """Its modules, imported from the mirror between stand-ins."""
    paths = [f"pipelines/{name}" for name in PIPELINES]
    root = tree(SOURCE, "modules/lora", *paths)
    for name in ("modules", "pipelines", *(path.replace("/", ".") for path in paths)):
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    quiet = types.SimpleNamespace(
        **dict.fromkeys(("debug", "error", "info", "trace", "warning"), lambda *a, **k: None)
    )
    options = types.SimpleNamespace(
        extra_networks_default_multiplier=1.0,
        lora_fuse_native=True,
        lora_fuse_diffusers=True,
        lora_force_diffusers=False,
        diffusers_offload_mode="balanced",
    )
    cache_of_files = types.SimpleNamespace(enable=lambda: None, disable=lambda: None)
    stand_ins = {
        "shared": {"opts": options, "sd_loaded": True, "sd_model": None, "sd_model_type": ""},
        "devices": {"device": torch.device("cpu"), "cpu": torch.device("cpu")},
        "logger": {"log": quiet, "console": None},
        "errors": {"display": lambda *a, **k: None},
        "sd_models_utils": {"state_dict_cache": cache_of_files},
        "sd_models": {"read_state_dict": lambda file, what="": dict(program.given)},  # type: ignore[attr-defined]
        **{name: {} for name in ("files_cache", "hashes", "sd_checkpoint", "sd_models_compile")},
    }
    for name, values in stand_ins.items():
        module = types.ModuleType(f"modules.{name}")
        vars(module).update(values)
        sys.modules[module.__name__] = module
        setattr(sys.modules["modules"], name, module)
    load = importlib.import_module("modules.lora.lora_load")
    load.dump_lora_keys = False
    return load


@cache
def model(family: str, blocks: int | None) -> Any:
    """A pipeline with the family's components."""
    made = types.SimpleNamespace()
    for part in families()[family].components:
        if part.name in ("transformer_2", "transformer_ref", "image_embedder"):
            continue
        whole = torch.nn.Module()
        absent = LACKING.get(family, "^$")
        for name, numbers in layers(family, part, naming(family, part.name), blocks, absent):
            put(whole, name, numbers)
        setattr(made, "llm_adapter" if part.name == "text_conditioner" else part.name, whole)
    return made


def naming(family: str, component: str) -> str:
    """How SD.Next's model names its layers: transformers 5.13 has CLIP's text model without a wrapper."""
    return "flat" if component == "text_encoder" else NAMINGS.get((family, component), "diffusers")


def load(file: File, blocks: int | None) -> Loaded:
    """The modules that it loads right, out of a model with this many blocks of each kind."""
    file = narrowed(file)
    tensors = tensors_of(file)
    added = _added(file.family, tensors, blocks)
    results = {}
    for component in {part.slot.component for part in file.parts}:
        result = Sum(file.family, component, naming(file.family, component))
        result.found = {
            name: (delta, None)
            for (where, name), delta in added.items()
            if where == component or (where, component) == ("llm_adapter", "text_conditioner")
        }
        results[component] = result
    return loaded(file, tensors, results)


def _added(
    family: str, tensors: Mapping[str, torch.Tensor], blocks: int | None
) -> dict[tuple[str, str], torch.Tensor]:
    """(component, layer) -> what is added to it, on the probe."""
    its, pipeline = program(), model(family, blocks)
    its.shared.sd_model, its.shared.sd_model_type = pipeline, TYPES[family]
    its.lora_cache.clear()
    program.given = tensors  # type: ignore[attr-defined]
    on_disk = types.SimpleNamespace(filename=__file__, name="a")
    with torch.no_grad():
        try:
            net = its.load_safetensors("a", on_disk)
        except Exception as error:  # `network_load` logs it and goes on without the file
            raise RefusedError(f"{type(error).__name__}: {str(error)[:100]}") from error
        if net is None:
            raise RefusedError("nothing matched")
        its.l.loaded_networks[:] = [net]
        its.l.extra_network_lora = types.SimpleNamespace(errors={})
        apply = importlib.import_module("modules.lora.lora_apply")
        found = {}
        for component, part in vars(pipeline).items():
            if not isinstance(part, torch.nn.Module):
                continue
            for name, layer in part.named_modules():
                stamp = getattr(layer, "network_layer_name", None)
                if getattr(layer, "weight", None) is None or stamp is None:
                    continue
                delta, _ = apply.network_calc_weights(layer, stamp)
                if delta is not None and delta.shape == layer.weight.shape:
                    found[component, name] = on_probe(delta)
    return found
