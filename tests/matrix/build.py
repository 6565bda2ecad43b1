"""Inputs: adapters of a form, a format, a dtype, an alpha and a bias; checkpoints in both layouts."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.matrix import algebra, spelling
from tests.matrix.algebra import Module
from tests.matrix.layers import CHECKPOINT, CHECKPOINT_TE, LAYERS, UNETS, Layer, Part
from tests.matrix.spelling import A_B, Effect
from tests.matrix.st import File, rounded, write

DTYPES = {
    "fp32": ("F32",),
    "fp16": ("F16",),
    "bf16": ("BF16",),
    "fp64": ("F64",),
    "mixed": ("F32", "F16"),
    "mixed64": ("F64", "F32"),
    "fp8": ("F8_E4M3",),
}
PEFT_TYPES = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR"}
OTHER_TYPES = {
    "peft-oft": "OFT", "peft-boft": "BOFT", "peft-ia3": "IA3", "peft-hira": "HIRA",
    "peft-adalora": "ADALORA",
}  # fmt: skip
SPELLED = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Adapter:
    """What one input file is."""

    family: str
    format: str
    form: str = "lora"
    group: str = "all"
    dtype: str = "fp32"
    alpha: str = "tensor"
    bias: str = "none"
    seed: int = 0
    naming: str = ""  # names that a format allows beside its usual ones

    def __str__(self) -> str:
        parts = [self.form, self.group, self.dtype, f"alpha_{self.alpha}", f"bias_{self.bias}"]
        return "-".join([*parts, *([self.naming] if self.naming else [])])


@dataclass
class Made:
    """A written adapter, and what it means: taken from how it was made, not read back."""

    path: Path
    file: File
    modules: list[tuple[Layer, Part | None, Module]] = field(default_factory=list)


GROUPS = {
    "all": lambda layer: True,
    "plain": lambda layer: layer.tag == "linear",
    "fused": lambda layer: layer.tag == "fused" and not layer.component,
    "swapped": lambda layer: layer.tag == "swapped",
    "conv": lambda layer: layer.tag.startswith("conv"),
    "te": lambda layer: bool(layer.component),
    "denoiser": lambda layer: not layer.component,
}


def groups(family: str) -> list[str]:
    """The groups that hold a layer of a family; `denoiser` says no more than `all` without text
    encoders.
    """
    held = [name for name, fits in GROUPS.items() if any(map(fits, LAYERS[family]))]
    return held if "te" in held else [name for name in held if name != "denoiser"]


def layers(family: str, group: str) -> list[Layer]:
    return [layer for layer in LAYERS[family] if GROUPS[group](layer)]


def weights(family: str, dtype: str = "F32") -> dict[str, np.ndarray]:
    """The base model: the same numbers for every cell of a family, rounded to `dtype`."""
    rng = np.random.default_rng(zlib.crc32(family.encode()))
    found = {}
    for layer in LAYERS[family]:
        name = layer.component + layer.name
        found[name] = rounded(rng.normal(0, 0.1, layer.shape), dtype)
        found[name + "|bias"] = rounded(rng.normal(0, 0.1, layer.rows), dtype)
    return found


def _alphas(spec: Adapter, count: int) -> tuple[list[int], list[float | None]]:
    """Rank and alpha of every module."""
    ranks = [algebra.RANK] * count
    if spec.form.startswith("lora-rank1"):
        ranks = [1] * count
    if spec.alpha in ("pattern", "tensor"):
        ranks = [r if n % 3 or r == 1 else 2 for n, r in enumerate(ranks)]
    if spec.alpha == "none":
        return ranks, [None] * count
    if spec.alpha in ("tensor", "pattern"):
        return ranks, [(2.0, 6.0, 4.0)[n % 3] for n in range(count)]
    value = {"odd": 33.33, "huge": 9999999999.0}.get(spec.alpha, 6.0)
    return ranks, [value] * count


def _config(
    spec: Adapter, names: list[str], ranks: list[int], alphas: list[float | None], kind: str
) -> dict:
    key = "lora_alpha" if kind in ("LORA", "ADALORA") else "alpha"
    config: dict = {"peft_type": kind, "target_modules": names, "inference_mode": True}
    if kind == "IA3":
        return config | {"feedforward_modules": []}
    if kind == "BOFT":
        sizes = {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 2}
        return config | sizes | {"bias": "none"}
    if kind == "OFT":
        return config | {
            "r": 0, "oft_block_size": 8, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
            "coft": False, "block_share": False, "bias": "none",
        }  # fmt: skip
    if kind == "ADALORA":
        sizes = {"init_r": algebra.RANK, "target_r": 2, "total_step": 5, "lora_alpha": 6.0}
        return config | sizes | {"bias": "none", "rank_pattern": None}
    config["r"] = ranks[0]
    config[key] = alphas[0] if alphas[0] is not None else ranks[0]
    if kind == "LORA":
        config |= {"use_dora": "dora" in spec.form, "use_rslora": spec.alpha == "rslora"}
        config |= {"lora_bias": spec.bias != "none", "bias": "none", "fan_in_fan_out": False}
    if kind in ("LOHA", "LOKR"):
        config["use_effective_conv2d"] = "tucker" in spec.form
    if kind == "LOKR":
        config |= {"decompose_both": "both" in spec.form, "decompose_factor": 4}
    rank_pattern = {n: r for n, r in zip(names, ranks, strict=True) if r != ranks[0]}
    alpha_pattern = {n: a for n, a in zip(names, alphas, strict=True) if a not in (None, alphas[0])}
    return config | {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _dora(magnitude: np.ndarray) -> np.ndarray:
    """PEFT's shape of the magnitudes of the outputs."""
    wide = (1,) * (magnitude.ndim - 2)
    return magnitude.reshape(1, -1, *wide) if wide else magnitude.reshape(-1)


def adapter(spec: Adapter, path: Path) -> Made | None:
    """Write what `spec` says; None where the format has no place for it."""
    found = [
        (stem, layer, part)
        for layer in layers(spec.family, spec.group)
        for stem, part in spelling.places(spec.family, spec.format, layer, spec.naming)
    ]
    if not found:
        return None
    rng = np.random.default_rng(zlib.crc32(f"{spec}{spec.family}{spec.seed}".encode()))
    ranks, alphas = _alphas(spec, len(found))
    kind = PEFT_TYPES.get(spec.form.partition("+")[0].partition("-")[0], "")
    kind = OTHER_TYPES.get(spec.form, kind)
    made = Made(path, File())
    stored = DTYPES[spec.dtype]
    peft_like = spec.format in ("peft", "diffusers")
    for n, (stem, layer, part) in enumerate(found):
        rows = part.stop - part.start if part else layer.rows
        roles = algebra.make(spec.form, (rows, *layer.shape[1:]), rng, ranks[n])
        if spec.form == "kohya-oft" and spec.family == "flux":  # one tensor for every part
            sizes = [p.stop - p.start for p in layer.parts]
            roles = {
                f"oft_blocks.{k}": rng.normal(0, 0.1, (4, size // 4, size // 4))
                for k, size in enumerate(sizes)
            }
        ranks[n] = algebra.stored_rank(roles) or ranks[n]
        meant: algebra.Roles = {}
        for role, value in roles.items():
            spelled = SPELLED.get(role, role) if spec.format in A_B else role
            if spec.format in ("diffusers-old", "xlabs"):
                spelled = role.removeprefix("lora_")
            dtype = "BOOL" if role == "on_input" else stored[len(meant) % len(stored)]
            peft = role == "dora_scale" and peft_like
            spelled = "lora_magnitude_vector" if peft else spelled
            made.file.put(f"{stem}.{spelled}", _dora(value) if peft else value, dtype)
            meant[role] = made.file.tensors[f"{stem}.{spelled}"].reshape(roles[role].shape)
        module = Module(meant, alphas[n], kohya=spec.format == "kohya-oft")
        module.root = spec.alpha == "rslora"
        module.always = kind == "LOKR" and spec.format == "peft"
        if kind == "ADALORA":
            module.rank = algebra.RANK
        if "oft" in spec.form or spec.form == "full" or spec.form.startswith("ia3"):
            module.alpha = 0.01 if spec.form == "kohya-oft" else None
        if module.always:
            module.rank = ranks[n]
        if spec.alpha in ("tensor", "odd", "huge") and module.alpha is not None:
            kind = "F32" if spec.dtype == "fp8" else stored[0]
            made.file.put(
                f"{stem}.alpha", np.full((1,) * (spec.alpha == "odd"), module.alpha), kind
            )
            module.alpha = float(made.file.tensors[f"{stem}.alpha"].reshape(-1)[0])
        elif spec.form in ("oft", "oft-rescaled", "boft"):
            made.file.put(f"{stem}.alpha", np.array(0.0), "F32")
        if spec.bias == "lora":
            made.file.put(f"{stem}.lora_B.bias", rng.normal(0, 0.1, rows), stored[0])
            module.bias = made.file.tensors[f"{stem}.lora_B.bias"] * algebra.bias_scale(module)
        elif spec.bias == "diff":
            made.file.put(f"{stem}.diff_b", rng.normal(0, 0.1, rows), stored[0])
            module.bias = made.file.tensors[f"{stem}.diff_b"]
        made.modules.append((layer, part, module))
    if spec.format == "peft":
        names = [stem.removeprefix("base_model.model.") for stem, _, _ in found]
        made.file.config = _config(spec, names, ranks, alphas, kind)
    elif spec.alpha in ("metadata", "pattern", "rslora"):
        header: dict = {}
        for prefix in dict.fromkeys(
            spelling.component(spec.family, layer) for _, layer, _ in found
        ):
            at = [
                n for n, (_, layer, _) in enumerate(found)
                if spelling.component(spec.family, layer) == prefix
            ]  # fmt: skip
            names = [found[n][0].removeprefix(prefix + ".") for n in at]
            config = _config(spec, names, [ranks[n] for n in at], [alphas[n] for n in at], "LORA")
            header |= {f"{prefix}.{k}": v for k, v in config.items() if k != "inference_mode"}
        made.file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
    write(path, made.file)
    return made


def _checkpoint_names(
    family: str, layer: Layer, layout: str
) -> list[tuple[str, str, str, Part | None]]:
    """(file, key of the weight, key of the bias, part)."""
    name = spelling.component(family, layer)
    if layout == "folder":
        file = f"{name}/diffusion_pytorch_model.safetensors"
        if layer.component:
            file = f"{name}/model.safetensors"
        return [(file, f"{p.name}.weight", f"{p.name}.bias", p) for p in layer.parts]
    prefix = (
        CHECKPOINT_TE.get((family, layer.component))
        if layer.component
        else CHECKPOINT.get(family, "")
    )
    if prefix is None:
        return []
    sign = "_" if layer.name.endswith("in_proj") else "."
    return [("", f"{prefix}{layer.name}{sign}weight", f"{prefix}{layer.name}{sign}bias", None)]


Origin = dict[str, tuple[str, str, Part | None]]  # "file:key" -> our name, the file, the rows


def origin(family: str, layout: str) -> Origin:
    """Where every tensor of a model of this layout comes from."""
    return {
        f"{file}:{spelled}": (layer.component + layer.name + more, file, part)
        for layer in LAYERS[family]
        for file, key, bias, part in _checkpoint_names(family, layer, layout)
        for spelled, more in ((key, ""), (bias, "|bias"))
    }


def seen(value: np.ndarray, part: Part | None) -> np.ndarray:
    """The rows of a weight as one module of the diffusers layout has them."""
    if part is None:
        return value
    rows = value[part.start : part.stop]
    return spelling.exchange(rows) if part.swapped else rows


def checkpoint(
    family: str, values: dict[str, np.ndarray], path: Path, layout: str, dtype: str
) -> Origin:
    """Write a model."""
    files: dict[str, File] = {}
    places = origin(family, layout)
    for spelled, (name, file, part) in places.items():
        key = spelled.partition(":")[2]
        files.setdefault(file, File()).put(key, seen(values[name], part), dtype)
    for file, held in files.items():
        target = path / file if file else path
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, held)
    return places


__all__ = [
    "UNETS",
    "Adapter",
    "Effect",
    "Made",
    "adapter",
    "checkpoint",
    "groups",
    "layers",
    "origin",
    "seen",
    "weights",
]
