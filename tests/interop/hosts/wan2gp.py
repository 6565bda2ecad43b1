"""Wan2GP's LoRA loader, run: `preprocess_loras` of its models, then mmgp's `load_loras_into_model`, and its forward.

Each model is an instance of Wan2GP's own class, without weights; its layers of a family's table get few columns, and
what mmgp's hook of a layer's forward adds to an input is what the layer adds. Stand-ins are the quantiser, attention,
the graphics card and the reader of files, which hands over tensors. A file that is refused stops the generation.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch

from adaptkit.detect import families
from adaptkit.keymap.rows import find_row
from adaptkit.names import Target
from tests.interop.hosts.added import Sum, layers, loaded, names_in, narrowed, put, tensors_of
from tests.interop.hosts.diffusers import probe
from tests.interop.hosts.files import File, is_denoiser
from tests.interop.hosts.loaded import Loaded, RefusedError
from tests.interop.hosts.sources import ABSENT, commit, tree
from tests.synth import fill

SOURCE, ENGINE = "deepbeepmeep/Wan2GP", "deepbeepmeep/mmgp"
DATE = "2026-08"
FLUX = {
    "in_channels": 64, "out_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10_000,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
CHROMA = {**FLUX, "guidance_embed": False, "chroma": True}
FLUX2 = {
    **FLUX, "in_channels": 128, "out_channels": 128, "vec_in_dim": 1, "context_in_dim": 15360, "hidden_size": 6144,
    "mlp_ratio": 3.0, "single_linear1_mlp_ratio": 6.0, "single_mlp_hidden_ratio": 3.0, "double_mlp_ratio": 3.0,
    "double_linear1_mlp_ratio": 6.0, "num_heads": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "qkv_bias": False,
    "flux2": True,
}  # fmt: skip
WAN = {
    "model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 2,
}  # fmt: skip
# of Wan's own: what its models of other kinds are made of
KINDS = (
    "multitalk.multitalk_utils", "animate.motion_encoder", "animate.face_blocks", "animate.model_animate",
    "scail.model_scail", "scail2", "steadydancer.small_archs", "steadydancer.mobilenetv2_dcd", "shotplan", "animate2",
)  # fmt: skip


@dataclass(frozen=True)
class Its:
    """A family's model: its class, how it is made, its name there, and how it names its layers."""

    module: str
    name: str
    model_type: str
    naming: str
    options: Mapping[str, Any]
    parameters: str = ""


MODELS = {
    "chroma": Its("models.flux.model", "Flux", "flux_chroma", "native", CHROMA, "FluxParams"),
    "flux": Its("models.flux.model", "Flux", "flux", "native", FLUX, "FluxParams"),
    "flux2": Its("models.flux.model", "Flux", "flux2_dev", "native", FLUX2, "FluxParams"),
    "krea2": Its(
        "models.krea2.krea2_mmdit", "SingleStreamDiT", "krea2", "native", {}, "SingleMMDiTConfig"
    ),
    "qwen-image": Its(
        "models.qwen.transformer_qwenimage",
        "QwenImageTransformer2DModel",
        "qwen_image_20B",
        "diffusers",
        {"num_layers": 2},
    ),
    "wan": Its("models.wan.modules.model", "WanModel", "i2v", "native", WAN),
    "z-image": Its(
        "models.z_image.z_image_transformer2d",
        "ZImageTransformer2DModel",
        "z_image",
        "diffusers",
        {"n_layers": 2},
    ),
}


def version() -> str:
    found = commit(SOURCE), commit(ENGINE)
    return ABSENT if ABSENT in found else f"{found[0]}, mmgp {found[1]}"


class _Anything(types.ModuleType):
    """A module whose every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


@cache
def program() -> Any:
    """mmgp's `offload`, imported from the mirrors between stand-ins; Wan2GP's models can be imported afterwards."""
    quantiser = [
        f"optimum{name}" for name in ("", ".quanto", ".quanto.tensor", ".quanto.tensor.qtype")
    ]
    sys.modules.update({name: _Anything(name) for name in quantiser})
    sys.modules["optimum.quanto"].register_qmodule = lambda kind: lambda made: made  # type: ignore[attr-defined]
    with mock.patch.object(sys, "path", [str(tree(ENGINE, "src/mmgp") / "src"), *sys.path]):
        offload = importlib.import_module("mmgp.offload")
    for name in quantiser:  # others look whether it is there
        del sys.modules[name]
    offload.safetensors2.torch_load_file = lambda path, **kw: dict(program.given)  # type: ignore[attr-defined]
    folders = ("flux", "krea2", "qwen", "wan/modules", "z_image")
    root = tree(SOURCE, *(f"models/{name}" for name in folders))
    packages = ("flux", "krea2", "qwen", "wan", "wan.modules", "z_image")
    for name in ("models", *(f"models.{package}" for package in packages)):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
    parents = {kind.partition(".")[0] for kind in KINDS}
    for name in (
        "shared",
        "shared.attention",
        *(f"models.wan.{kind}" for kind in (*parents, *KINDS)),
    ):
        sys.modules[name] = _Anything(name)
    sys.modules["wgp"] = wgp = types.ModuleType("wgp")
    wgp.test_class_i2v = lambda model_type: True  # type: ignore[attr-defined]
    return offload


@cache
def instance(family: str) -> Any:
    """Wan2GP's model without weights."""
    program()
    its = MODELS[family]
    module = importlib.import_module(its.module)
    options = dict(its.options)
    with torch.device("meta"):
        if its.parameters:
            made = getattr(module, its.name)(getattr(module, its.parameters)(**options))
        else:
            made = getattr(module, its.name)(**options)
    return made


@cache
def model(family: str, blocks: int | None) -> tuple[torch.nn.Module, Any, Mapping[str, Any]]:
    """Its layers with few columns, hooked as mmgp hooks them; the hook's owner; which layers are split."""
    offload, its, real = program(), MODELS[family], instance(family)
    known, whole = dict(real.named_modules()), torch.nn.Module()
    part = next(part for part in families()[family].components if is_denoiser(part.name))
    for name, numbers in layers(family, part, its.naming, blocks):
        layer = known.get(name)
        if layer is not None and layer.weight.shape[0] == len(numbers):
            made = put(whole, name, numbers)
            if layer.bias is None:
                made.bias = None
    split: Mapping[str, Any] = {}
    if its.module == "models.flux.model":
        rule = importlib.import_module("models.flux.modules.layers").get_linear_split_map
        got = (getattr(real.params, key, None) for key in ("single_linear1_mlp_ratio", "double_linear1_mlp_ratio"))  # fmt: skip
        split = rule(real.hidden_size, real.params.mlp_ratio, *got)
        offload.split_linear_modules(whole, split)
    owner = object.__new__(offload.offload)
    whole._loras_model_data, whole._loras_model_shortcuts = {}, {}  # type: ignore[assignment]
    for name, layer in whole.named_modules():
        if hasattr(layer, "weight"):
            layer.forward = owner.hook_lora(
                layer, whole, "transformer", whole._loras_model_data, whole._loras_model_shortcuts, name
            )  # fmt: skip
            layer._mm_manager = owner
    return whole, owner, split


def has(family: str, target: Target) -> bool:
    """Whether a layer was tried: layers of other kinds of a model were not, nor windows, nor a second transformer."""
    if not is_denoiser(target.component):
        return True
    hit = find_row(families()[family], target.component, target.module)
    assert hit is not None
    row, indices = hit
    names = {fill(name.module, indices) for name in names_in(row, MODELS[family].naming)}
    built = dict(instance(family).named_modules()).keys()
    return target.component == "transformer" and not row.kernel and names <= built


def load(file: File, blocks: int | None) -> Loaded:
    """The modules that it loads right, out of a model with this many blocks of each kind."""
    file = narrowed(file)
    tensors = tensors_of(file)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        added = dict(_added(file.family, tensors, blocks))
    part = next(part.name for part in families()[file.family].components if is_denoiser(part.name))
    result = Sum(file.family, part, MODELS[file.family].naming)
    result.found = {name: (delta, None) for name, delta in added.items()}
    return loaded(file, tensors, {part: result})


def _added(
    family: str, tensors: Mapping[str, torch.Tensor], blocks: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a file adds to every layer, on the probe."""
    offload, (whole, owner, split) = program(), model(family, blocks)
    program.given = tensors  # type: ignore[attr-defined]
    real, its = instance(family), MODELS[family]
    prepare = getattr(real, "preprocess_loras", None)
    try:
        offload.load_loras_into_model(
            whole,
            [__file__],
            [1.0],
            activate_all_loras=True,
            preprocess_sd=(lambda given: prepare(its.model_type, given)) if prepare else None,
            split_linear_modules_map=split or None,
        )
    except Exception as error:
        raise RefusedError(f"{type(error).__name__}: {str(error)[:100]}") from error
    if whole._loras_errors:
        raise RefusedError(whole._loras_errors[0][1][:100])
    active, found = whole._loras_active_adapters, {}
    with mock.patch.object(torch.Tensor, "cuda", lambda self, **kw: self):
        owner._move_loras(active, whole._loras_model_data, True, whole)
    for name, layer in whole.named_modules():
        if getattr(layer, "_mm_lora_data", None):
            try:
                found[name] = _through(layer)
            except RuntimeError as error:
                raise RefusedError(f"in the forward pass: {str(error)[:100]}") from error
    # parts of a layer that was split are one again
    for last, rule in split.items():
        for stem in {name.rpartition(".")[0] for name, _ in whole.named_modules() if name}:
            names = [f"{stem}.{part}" for part in rule["mapped_modules"]]
            if any(name in found for name in names):
                nothing = map(torch.zeros, rule["split_sizes"])
                parts = [found.pop(name, zeros) for name, zeros in zip(names, nothing, strict=True)]
                found[f"{stem}.{last}"] = torch.cat([part.double() for part in parts])
    yield from found.items()


def _through(layer: torch.nn.Module) -> torch.Tensor:
    """What a hooked layer adds, on the probe."""
    _, columns, *kernel = layer.weight.shape
    given = probe(torch.Size((columns, *kernel)).numel()).reshape(1, columns, *kernel)
    before, old = layer.weight, layer._mm_lora_old_forward
    return (layer.forward(given) - old(given)).reshape(-1)[: len(before)]
