"""The real diffusers and PEFT: a file's tensors go through `lora_state_dict` and into a model's layers.

The model has the layers that a family's diffusers class has (`tests/interop/test_family_models.py` proves their names),
with their real widths, without weights, and without a forward pass: loading looks at names and shapes alone.
"""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from adaptkit.detect import families
from adaptkit.families.contract import Kind, Name, Row
from adaptkit.keymap.rows import find_row
from adaptkit.names import Rows
from tests.interop.hosts.files import File, Part, _shape, _share, is_denoiser
from tests.interop.hosts.loaded import Loaded, RefusedError
from tests.synth import FIELD, expand, fill

MIXINS = {
    "sd1": "StableDiffusion",
    "sd2": "StableDiffusion",
    "sdxl": "StableDiffusionXL",
    "sdxl-refiner": "StableDiffusionXL",
    "sd3": "SD3",
    "sd35-large": "SD3",
    "flux": "Flux",
    "chroma": "Flux",
    "flux2": "Flux2",
    "hunyuan-video": "HunyuanVideo",
    "framepack": "HunyuanVideo",
    "qwen-image": "QwenImage",
    "wan": "Wan",
    "z-image": "ZImage",
    "lumina2": "Lumina2",
    "anima": "Anima",
    "krea2": "Krea2",
    "ideogram4": "Ideogram4",
    "auraflow": "AuraFlow",
    "ltx": "LTXVideo",
    "ltx2": "LTX2",
    "ltx-13b": "LTXVideo",
    "minimax-h3": "MiniMaxH3",
    "qwen-image-21": "QwenImage",
    "ernie-image": "ErnieImage",
    "hidream": "HiDreamImage",
    "ace-step": "AceStep",
    "kandinsky5": "Kandinsky",
    "cogvideox": "CogVideoX",
    "cogview4": "CogView4",
    "mochi": "Mochi1",
    "sana": "Sana",
    "flux3": "Flux3",
    "bria-fibo": "Flux",
    "bria-fibo2": "BriaFibo2",
    "cosmos": "Cosmos",
    "cosmos-14b": "Cosmos",
    "wan-animate2": "Wan",
}
JOINT = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
LOKR = ("z-image", "flux2")  # whose check of the keys lets LoKr pass


def version() -> str:
    import diffusers

    return diffusers.__version__


def mixin(family: str) -> Any:
    import diffusers.loaders.lora_pipeline as pipelines

    return getattr(pipelines, f"{MIXINS[family]}LoraLoaderMixin")


@cache
def skeleton_class() -> Any:
    from diffusers.loaders.peft import PeftAdapterMixin

    class Skeleton(torch.nn.Module, PeftAdapterMixin):
        """A tree of layers without weights."""

        config: Mapping[str, Any] = {}

        def fuse_qkv_projections(self) -> None:
            """What a LoKr of joint projections is loaded into, beside the single ones, as in diffusers."""
            for module in list(self.modules()):
                for joint, names in JOINT.items():
                    if all(name in module._modules for name in names):
                        shapes = [module._modules[name].weight.shape for name in names]  # type: ignore[union-attr]
                        _put(module, joint, (sum(s[0] for s in shapes), shapes[0][1]))

    return Skeleton


def folder(family: str, component: str) -> str:
    """The name that diffusers has for a component; the connectors of LTX-2 are two with us."""
    return families()[family].component(component).tags["diffusers"][0]


# own layers of models that share a family's loader, and of which diffusers has no class
ABSENT = {
    "chroma": r"^(img_in_patch|nerf_)",  # Radiance
    "wan": r"^(audio_injector|audio_proj|casual_audio_encoder|frame_packer|cond_encoder)\.?"  # S2V
    r"|\.audio_cross_attn_wrapper\.|^patch_embedding_(mask|pose)$|^ref_conv$"  # HuMo, SCAIL, Fun
    r"|\.(cam_encoder|projector)$|^control_adapter\.",  # ReCam, Fun-Camera
}


def skeleton(
    family: str, component: str, blocks: int | None, *, whole: bool = False
) -> torch.nn.Module:
    """The layers of a component in diffusers' names; `whole`: those too that it has no class for."""
    model, name = skeleton_class()(), folder(family, component)
    absent = re.compile("$^" if whole else ABSENT.get(family, "$^"))
    rows = [
        (part, row)
        for part in families()[family].components
        if name in part.tags.get("diffusers", ())
        for row in part.rows
        if row.kind is Kind.MATRIX
    ]
    for part, row in rows:
        shape = _shape(family, part, row)
        for indices in expand(row):
            if blocks is not None and any(index >= blocks for index in indices.values()):
                continue
            for name in row.names["diffusers"]:
                if absent.search(name.module):
                    continue
                rows = shape[0] if name.rows is None else _share(shape[0], name.rows)
                _put(model, fill(name.module, indices), (rows, *shape[1:]))
    return model


def _put(model: torch.nn.Module, path: str, shape: tuple[int, ...]) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        if folder not in model._modules:
            model.add_module(folder, torch.nn.Module())
        model = model._modules[folder]  # type: ignore[assignment]
    if len(shape) == 2:
        layer: torch.nn.Module = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    else:
        kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(shape) - 3]
        layer = kind(shape[1], shape[0], shape[2:], bias=False, device="meta")
    # one number in memory; PEFT puts its factors on the device of the weight, so this cannot stay on meta
    layer.weight = torch.nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)
    model.add_module(last, layer)


# ------------------------------------------------------------------ what is added to a weight


def probe(inputs: int) -> torch.Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(inputs), dtype=torch.float64)


def low_rank(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """What a LoRA makes of the probe."""
    down = down.flatten(1).double()
    return scale * (up.flatten(1).double() @ (down @ probe(down.shape[1])))


def kron(w1: torch.Tensor, w2: torch.Tensor, scale: float) -> torch.Tensor:
    """What a LoKr of full factors makes of the probe."""
    w1, w2 = w1.double(), w2.double().flatten(1)
    x = probe(w1.shape[1] * w2.shape[1]).reshape(w1.shape[1], w2.shape[1])
    return scale * (w1 @ x @ w2.T).flatten()


def meant(file: File, part: Part, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a module of a file is to add, on the probe; None for algorithms that diffusers has no form of."""
    mine = {k: tensors[f"{part.stem}.{k}"] for k in file.form.tensors(part.shape)}
    alpha = file.form.alpha
    spelled = (
        ("lora_up", "lora_down"),
        ("lora_B", "lora_A"),
        ("lora.up", "lora.down"),
        ("up", "down"),
    )
    for up, down in spelled:
        if f"{up}.weight" in mine and "lora_mid.weight" not in mine:
            down_weight = mine[f"{down}.weight"]
            scale = 1.0 if alpha is None else alpha / down_weight.shape[0]
            return low_rank(mine[f"{up}.weight"], down_weight, scale)
    if "lokr_w2" in mine and len(part.shape) == 2:
        return kron(mine["lokr_w1"], mine["lokr_w2"], 1.0)
    if "lokr_w2_a" in mine and len(part.shape) == 2:
        scale = (alpha or 0.0) / mine["lokr_w2_b"].shape[0]
        return kron(mine["lokr_w1"], mine["lokr_w2_a"] @ mine["lokr_w2_b"], scale)
    return None


def _in_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """(module, what it adds on the probe, its DoRA magnitude) of every adapted layer."""
    from peft.tuners.lokr import LoKrLayer
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A
            magnitude = layer.lora_magnitude_vector
            vector = magnitude[adapter].weight if adapter in magnitude else None
            up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            if not up.is_meta and not down.is_meta:
                yield name, low_rank(up.data, down.data, layer.scaling[adapter]), vector
        elif isinstance(layer, LoKrLayer):
            (adapter,) = layer.r
            w1 = layer.lokr_w1[adapter]
            if adapter in layer.lokr_w2:
                w2, scale = layer.lokr_w2[adapter], 1.0
            else:
                w2 = layer.lokr_w2_a[adapter] @ layer.lokr_w2_b[adapter]
                scale = layer.scaling[adapter]
            if not w1.is_meta and not w2.is_meta:
                yield name, kron(w1.data, w2.data, scale), None


def _single(
    name: str, added: torch.Tensor, magnitude: torch.Tensor | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """What a joint projection adds, by the single ones that it stands for."""
    stem, dot, last = name.rpartition(".")
    if last not in JOINT:
        return {name: (added, magnitude)}
    return {
        f"{stem}{dot}{part}": (rows, None)
        for part, rows in zip(JOINT[last], added.chunk(3), strict=True)
    }


class Result:
    """What the layers of one component add, by target, in the target's order of rows."""

    def __init__(self, family: str, component: str) -> None:
        self.family, self.component = families()[family], component
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def names(self, row: Row) -> tuple[Name, ...]:
        """The layers of the model that hold a row of the family's table."""
        return row.names["diffusers"]

    def right(self, part: Part, expected: torch.Tensor, magnitude: torch.Tensor | None) -> bool:
        hit = find_row(self.family, self.component, part.slot.target.module)
        assert hit is not None
        row, indices = hit
        added = [(name, self.found.get(fill(name.module, indices))) for name in self.names(row)]
        if part.swapped:
            expected = expected.roll(len(expected) // 2)
        here = _bounds(part.slot.rows)
        for name, layer in added:
            there = _bounds(name.rows)
            if there[1] <= here[0] or there[0] >= here[1]:
                continue  # other rows
            if layer is None:
                return False
            got, vector = layer
            if (magnitude is None) != (vector is None):
                return False
            if vector is not None and vector.is_meta:
                return False
            if not _equal(magnitude, vector):
                return False
            if name.swapped:
                got = got.roll(len(got) // 2)
            total = len(got) / (there[1] - there[0])
            low, high = max(here[0], there[0]), min(here[1], there[1])
            cut = slice(round((low - there[0]) * total), round((high - there[0]) * total))
            mine = slice(round((low - here[0]) * total), round((high - here[0]) * total))
            if got[cut].shape != expected[mine].shape:
                return False
            if not torch.allclose(got[cut], expected[mine], rtol=1e-4, atol=1e-5):
                return False
        return True


def _equal(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is None or two is None or torch.equal(one.flatten(), two.flatten())


def _bounds(rows: Rows | None) -> tuple[float, float]:
    return (0.0, 1.0) if rows is None else (rows.start / rows.total, rows.stop / rows.total)


# ------------------------------------------------------------------ loading


def load(file: File, blocks: int | None) -> Loaded:
    """The modules that diffusers loads right, out of a model with this many blocks of each kind."""
    if file.family not in MIXINS:
        raise RefusedError("no pipeline")
    tensors = file.tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        _quiet()
        try:
            # converters scale tensors in place; a constant one is a single number in memory
            given = {k: t if 0 in t.stride() else t.clone() for k, t in tensors.items()}
            state, alphas, metadata = _state(file, given)
            results = dict(_loaded(file, state, alphas, metadata, blocks))
        except Exception as error:
            if isinstance(error, NameError) and _ours(error):  # a fault here, no verdict
                raise
            raise RefusedError(f"{type(error).__name__}: {str(error)[:100]}") from error
        finally:
            logging.disable(logging.NOTSET)
    found = set()
    for part in file.parts:
        expected = meant(file, part, tensors)
        result = results.get(part.slot.component)
        vector = next((tensors[k] for k in _magnitudes(part) if k in tensors), None)
        if expected is not None and result is not None and result.right(part, expected, vector):
            found.add(part.stem)
    return Loaded(frozenset(found))


def _ours(error: Exception) -> bool:
    """Whether an error comes from this file, not from the loader."""
    return traceback.extract_tb(error.__traceback__)[-1].filename == __file__


@cache
def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _magnitudes(part: Part) -> tuple[str, ...]:
    return f"{part.stem}.dora_scale", f"{part.stem}.lora_magnitude_vector"


def _state(
    file: File, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """`load_lora_weights` up to the point where it hands the tensors to the components."""
    cls = mixin(file.family)
    options: dict[str, Any] = {"return_lora_metadata": True}
    if MIXINS[file.family].startswith("StableDiffusion"):
        options["unet_config"] = _unet_config(file.family)
    if MIXINS[file.family] == "Flux":
        options["return_alphas"] = True
    found = cls.lora_state_dict(tensors, **options)
    state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    if MIXINS[file.family] == "Flux":
        if not any("lora" in key for key in state):
            raise ValueError("Invalid LoRA checkpoint")
        return state, alphas, metadata
    allowed = ("lora", "lokr") if file.family in LOKR else ("lora",)
    if not all(any(word in key for word in allowed) for key in state):
        raise ValueError("Invalid LoRA checkpoint")
    return state, alphas, metadata


@cache
def _unet_config(family: str) -> Any:
    class Config:
        layers_per_block = 2

    return Config()


def _loaded(
    file: File, state: dict[str, torch.Tensor], alphas: Any, metadata: Any, blocks: int | None
) -> Iterator[tuple[str, Result]]:
    cls = mixin(file.family)
    for component in sorted({part.slot.component for part in file.parts}):
        result = Result(file.family, component)
        if is_denoiser(component) or not component.startswith("text_encoder"):
            model = skeleton(file.family, component, blocks)
            model.load_lora_adapter(  # type: ignore[operator]
                state,
                prefix=folder(file.family, component),
                network_alphas=alphas or None,
                metadata=metadata,
                low_cpu_mem_usage=True,
            )
            for name, added, magnitude in _in_layers(model):
                result.found |= _single(name, added, magnitude)
        elif component in cls._lora_loadable_modules:
            clip = _clip(file.family, component, blocks)
            cls.load_lora_into_text_encoder(
                state,
                network_alphas=alphas or None,
                text_encoder=clip,
                prefix=component,
                metadata=metadata,
            )
            for name, added, magnitude in _in_layers(clip):
                full = name if name.startswith("text_") else f"text_model.{name}"
                result.found[full] = added, magnitude
        yield component, result


def _clip(family: str, component: str, blocks: int | None) -> torch.nn.Module:
    """A real CLIP text encoder, as wide as the family's and with this many layers."""
    import transformers

    part = families()[family].component(component)
    rows = {row.target: row for row in part.rows}
    layer = next(name for name in rows if name.endswith(".mlp.fc1"))
    wide, width = _shape(family, part, rows[layer])
    bound = int(FIELD.findall(layer)[0][1])
    projected = "text_projection" in rows
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=wide,
        projection_dim=width,
        num_hidden_layers=min(bound, blocks or bound),
        num_attention_heads=4,
        vocab_size=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        return kind(config).eval()
