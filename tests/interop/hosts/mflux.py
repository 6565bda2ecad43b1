"""mflux' LoRA loader itself: its mapping run on its own model classes, with two blocks of each kind.

Needs a checkout of filipstrand/mflux and mlx, which also runs on Linux (`pip install --target FOLDER "mlx[cpu]" platformdirs`):
`ADAPTKIT_MFLUX` names the checkout, then the folder of mlx if it is not installed, joined as in `PATH`. Without it nothing
is compared. Measured with 97ac5e6 and mlx 0.32.4.

Which layer of ours a layer of its models is, its mapping of the base model's weights tells. A module counts as loaded if
the layer adds what was meant.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.names import Target
from tests.interop.hosts.deltas import agree
from tests.interop.hosts.diffusers import low_rank, meant
from tests.interop.hosts.files import File, Part, is_denoiser
from tests.interop.hosts.loaded import Loaded, Place, RefusedError
from tests.synth import expand, fill

VERSION = "97ac5e6"
DATE = "2026-12"
VARIABLE = "ADAPTKIT_MFLUX"
ROOM = "mflux.models"
LARGE = 1 << 20
NUMBER = re.compile(r"\d+|\{block\}")

# family -> mapping of adapters, model, mapping of weights, how many blocks under which options
MODELS: Mapping[str, tuple[str, str, str, tuple[str, ...], Mapping[str, Any]]] = {
    "flux": (
        "flux.weights.flux_lora_mapping.FluxLoRAMapping",
        "flux.model.flux_transformer.transformer.Transformer",
        "flux.weights.flux_weight_mapping.FluxWeightMapping",
        ("num_transformer_blocks", "num_single_transformer_blocks"),
        {},
    ),
    # as wide as FLUX.2 dev, of which the shapes of our files are; it has models of klein only
    "flux2": (
        "flux2.weights.flux2_lora_mapping.Flux2LoRAMapping",
        "flux2.model.flux2_transformer.transformer.Flux2Transformer",
        "flux2.weights.flux2_weight_mapping.Flux2WeightMapping",
        ("num_layers", "num_single_layers"),
        {"num_attention_heads": 48, "joint_attention_dim": 15360},
    ),
    "qwen-image": (
        "qwen.weights.qwen_lora_mapping.QwenLoRAMapping",
        "qwen.model.qwen_transformer.qwen_transformer.QwenTransformer",
        "qwen.weights.qwen_weight_mapping.QwenWeightMapping",
        ("num_layers",),
        {},
    ),
    "z-image": (
        "z_image.weights.z_image_lora_mapping.ZImageLoRAMapping",
        "z_image.model.z_image_transformer.transformer.ZImageTransformer",
        "z_image.weights.z_image_weight_mapping.ZImageWeightMapping",
        ("n_layers", "n_refiner_layers"),
        {},
    ),
    "ernie-image": (
        "ernie_image.weights.ernie_lora_mapping.ErnieLoRAMapping",
        "ernie_image.model.ernie_transformer.transformer.ErnieTransformer",
        "ernie_image.weights.ernie_weight_mapping.ErnieWeightMapping",
        ("num_layers",),
        {},
    ),
    "krea2": (
        "krea2.weights.krea2_lora_mapping.Krea2LoRAMapping",
        "krea2.model.krea2_transformer.transformer.Krea2Transformer",
        "krea2.weights.krea2_weight_mapping.Krea2WeightMapping",
        ("layers",),
        {},
    ),
    "ideogram4": (
        "ideogram4.weights.ideogram4_lora_mapping.Ideogram4LoRAMapping",
        "ideogram4.model.ideogram4_transformer.transformer.Ideogram4Transformer",
        "ideogram4.weights.ideogram4_weight_mapping.Ideogram4WeightMapping",
        (),
        {},
    ),
}


@cache
def available() -> bool:
    """Whether the checkout and mlx are there; they are put on the path, behind all else."""
    folders = os.environ.get(VARIABLE, "").split(os.pathsep)
    if not Path(folders[0], "src", "mflux").is_dir():
        return False
    for folder in (str(Path(folders[0], "src")), *folders[1:]):
        if folder not in sys.path:
            sys.path.append(folder)
    if importlib.util.find_spec("mlx") is None:
        return False
    for family in {path.partition(".")[0] for path, *_ in MODELS.values()}:
        # its own import the pipelines, and with them what draws and saves pictures
        package = types.ModuleType(f"{ROOM}.{family}")
        package.__path__ = [str(Path(folders[0], "src", "mflux", "models", family))]
        sys.modules.setdefault(package.__name__, package)
    return True


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"{ROOM}.{module}"), name)


@cache
def mappings(family: str) -> Any:
    """Its patterns of keys, each with the layer that it leads to."""
    loader = _named("common.lora.mapping.lora_loader.LoRALoader")
    return loader._build_pattern_mappings(_named(MODELS[family][0]).get_mapping())


def plausible(family: str, keys: Iterable[str]) -> list[Any]:
    """Its patterns in their order, without those that differ from every key in more than numbers: they cannot fit."""
    wanted = {NUMBER.sub("", key) for key in keys}
    return [m for m in mappings(family) if NUMBER.sub("", m.source_pattern) in wanted]


def model(family: str, blocks: int | None) -> Any:
    """A transformer of its class; its weights are never computed."""
    _, path, _, counts, options = MODELS[family]
    size = {} if blocks is None else dict.fromkeys(counts, blocks)
    if family == "flux":
        config = _named("common.config.model_config.ModelConfig").dev()
        return _named(path)(config, **size)
    if family == "ideogram4":
        import mlx.core as mx

        config = _named("ideogram4.model.ideogram4_transformer.config.Ideogram4Config")
        made = _named(path)(config() if blocks is None else config(num_layers=blocks))
        for _, layer in made.named_modules():
            if hasattr(layer, "weight_scale"):  # has no weight before the model is loaded
                layer.weight = mx.zeros((layer.out_features, layer.in_features), dtype=mx.uint8)
        return made
    return _named(path)(**size, **options)


@cache
def places(family: str) -> Mapping[str, Place]:
    """Its layers -> ours, as its mapping of the base model's weights leads there."""
    mapper = _named("common.weights.mapping.weight_mapper.WeightMapper")
    (part,) = [p for p in families()[family].components if is_denoiser(p.name)]
    flat = mapper._build_flat_mapping(_named(MODELS[family][2]).get_transformer_mapping(), 64, 64)
    found: dict[str, Place] = {}
    for row in part.rows:
        if row.kind is not Kind.MATRIX:
            continue
        for indices in expand(row):
            target = Target(part.name, fill(row.target, indices))
            for naming in row.names:
                for name in row.names[naming]:
                    key = f"{fill(name.module, indices)}.weight"
                    for path, _ in flat.get(key, ()):
                        place = Place(target, name.rows, name.swapped)
                        found.setdefault(path.removesuffix(".weight"), place)
    return found


def load(file: File, blocks: int | None) -> Loaded:
    """The modules that mflux loads right, out of a model with this many blocks of each kind."""
    import mlx.core as mx
    import numpy as np

    tensors = file.tensors()
    # no large tensor is ever asked for
    given = {k: mx.array(t.numpy() if t.numel() <= LARGE else np.zeros(1)) for k, t in tensors.items()}  # fmt: skip
    loader = _named("common.lora.mapping.lora_loader.LoRALoader")
    transformer = model(file.family, blocks)
    with contextlib.redirect_stdout(io.StringIO()):
        _, matched = loader._apply_lora_with_mapping(
            transformer, given, 1.0, plausible(file.family, given), role=None
        )
    assert not any(tensors[key].numel() > LARGE for key in matched)
    added: dict[Target, list[tuple[Place, torch.Tensor]]] = {}
    for path, up, down, scale in _adapted(transformer):
        if up.shape[1] != down.shape[0]:
            raise RefusedError(f"{path}: its product fails while it generates")
        place = places(file.family)[path]
        added.setdefault(place.target, []).append((place, low_rank(up, down, scale)))
    return Loaded(frozenset(part.stem for part in file.parts if _right(file, part, tensors, added)))


def _right(
    file: File,
    part: Part,
    tensors: Mapping[str, torch.Tensor],
    added: Mapping[Target, list[tuple[Place, torch.Tensor]]],
) -> bool:
    """Whether the layers of a module's rows add what it means there."""
    expected = meant(file, part, tensors)
    magnitude = any(key.startswith(("dora", "lora_mag")) for key in file.form.tensors(part.shape))
    if expected is None or magnitude or not part.denoiser:
        return False
    return agree(part, expected, added.get(part.slot.target, ()))


def _adapted(transformer: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(layer, up, down, scale) of every layer that got an adapter."""
    import numpy as np

    kind = _named("common.lora.layer.linear_lora_layer.LoRALinear")
    for path, layer in transformer.named_modules():
        if isinstance(layer, kind):
            up, down = (
                torch.from_numpy(np.array(t)).double().T for t in (layer.lora_B, layer.lora_A)
            )
            yield path, up, down, float(layer.scale)
