"""Small kohya SD 1.x adapters of every algorithm, and their ΔW read back in NumPy float64, sharing no code with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import oracle

Array = np.ndarray
Tensors = dict[str, torch.Tensor]

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
LINEAR = f"{BLOCK}_attn1_to_q"
WIDE = f"{BLOCK}_ff_net_0_proj"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
SHAPES: dict[str, tuple[int, ...]] = {
    LINEAR: (24, 32),
    WIDE: (48, 20),
    CONV: (16, 12, 3, 3),
    POINT: (20, 16, 1, 1),
}
KINDS = ("lora", "tucker", "loha", "lokr", "lokr-factored", "lokr-low", "full")


def module(
    kind: str, name: str, shape: tuple[int, ...], draw: np.random.Generator, rank: int = 6
) -> dict[str, Array]:
    """The stored tensors of one module by key; spectra fall off, so that cutting rank has a cost to tell."""
    rows, inputs, kernel = shape[0], shape[1], shape[2:]
    ones = (1,) * len(kernel)

    def normal(*size: int) -> Array:
        return draw.standard_normal(size)

    falloff = np.arange(1, rank + 1) ** -0.8
    window = int(np.prod(kernel))
    match kind:
        case "lora":
            tensors = {
                "lora_up.weight": (normal(rows, rank) * falloff).reshape(rows, rank, *ones),
                "lora_down.weight": normal(rank, inputs, *kernel),
                "alpha": np.float64(rank * 0.75),
            }
        case "tucker":
            if not kernel:
                return module("lora", name, shape, draw, rank)
            tensors = {
                "lora_up.weight": (normal(rows, rank) * falloff).reshape(rows, rank, *ones),
                "lora_mid.weight": normal(rank, rank, *kernel),
                "lora_down.weight": normal(rank, inputs, *ones),
                "alpha": np.float64(rank * 0.5),
            }
        case "loha":
            tensors = {
                "hada_w1_a": normal(rows, 3),
                "hada_w1_b": normal(3, inputs * window),
                "hada_w2_a": normal(rows, 3),
                "hada_w2_b": normal(3, inputs * window),
                "alpha": np.float64(1.5),
            }
        case "lokr" | "lokr-factored" | "lokr-low":
            c, d = rows // 4, inputs // 4
            tensors = {"lokr_w1": normal(4, 4), "alpha": np.float64(1.0)}
            if kind == "lokr-factored":
                tensors = {
                    "lokr_w1_a": normal(4, 2),
                    "lokr_w1_b": normal(2, 4),
                    "alpha": np.float64(1.0),
                }
            if kind == "lokr":
                tensors["lokr_w2"] = normal(c, d, *kernel)
            else:
                tensors |= {
                    "lokr_w2_a": normal(c, 2) * [1.0, 0.4],
                    "lokr_w2_b": normal(2, d * window),
                }
        case "full":
            tensors = {"diff": normal(*shape)}
        case _:
            raise ValueError(kind)
    return {f"{name}.{role}": tensor for role, tensor in tensors.items()}


def adapter(
    path: Path,
    kind: str = "lora",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    names: Iterable[str] = SHAPES,
    metadata: Mapping[str, str] | None = None,
    extra: Tensors | None = None,
    rank: int = 6,
) -> Path:
    """A file with one module of this kind for each of `names`."""
    draw = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name in names:
        for key, array in module(kind, name, SHAPES[name], draw, rank).items():
            tensors[key] = torch.tensor(
                array, dtype=torch.float32 if key.endswith("alpha") else dtype
            )
    save_file({**tensors, **(extra or {})}, path, None if metadata is None else dict(metadata))
    return path


def deltas(path: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Array]:
    """ΔW of each module of a kohya file as a matrix (rows, inputs · kernel), from its tensors and the papers' formulas."""
    with safe_open(path, "np") as file:
        keys = list(file.keys())
        raw = {key: _float64(file, key) for key in keys}
    found: dict[str, Array] = {}
    for name in dict.fromkeys(key.split(".", 1)[0] for key in keys):
        mine = {
            key.split(".", 1)[1]: tensor
            for key, tensor in raw.items()
            if key.startswith(f"{name}.")
        }
        found[name] = _delta(mine, shapes[name]).reshape(shapes[name][0], -1)
    return found


def _float64(file: object, key: str) -> Array:
    return np.asarray(file.get_tensor(key), dtype=np.float64)  # type: ignore[attr-defined]


def _delta(tensors: dict[str, Array], shape: tuple[int, ...]) -> Array:
    kernel = shape[2:]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    if "diff" in tensors:
        return tensors["diff"]
    if "lora_up.weight" in tensors:
        up, down, mid = (tensors.get(f"lora_{role}.weight") for role in ("up", "down", "mid"))
        assert up is not None
        assert down is not None
        rank = down.shape[0]
        scale = 1.0 if alpha is None else alpha / rank
        up = up.reshape(up.shape[0], -1)
        if mid is not None:
            return scale * np.einsum("op,pq...,qi->oi...", up, mid, down.reshape(rank, -1))
        return scale * (up @ down.reshape(rank, -1))
    if "hada_w1_a" in tensors:
        return oracle.loha(
            {key.removeprefix("hada_"): t for key, t in tensors.items() if key != "alpha"},
            alpha,
            kernel,
        )
    stored = {key.removeprefix("lokr_"): t for key, t in tensors.items() if key != "alpha"}
    return oracle.lokr_stored(stored, alpha, kernel)


def provenance(path: Path) -> dict[str, object]:
    """adaptkit's newest record in the metadata of a file."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    found: dict[str, object] = json.loads(metadata["adaptkit"])[-1]
    return found


def relative(one: Mapping[str, Array], two: Mapping[str, Array]) -> float:
    """‖one − two‖ / ‖two‖ over all modules of `two`; a module that `one` lacks counts as zero."""
    lost = sum(((two[name] - one.get(name, 0.0)) ** 2).sum() for name in two)
    return float((lost / sum((delta**2).sum() for delta in two.values())) ** 0.5)
