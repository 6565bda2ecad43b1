"""Small checkpoints and known differences for the tests of the verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from adaptkit.keymap import compile_checkpoint
from tests import oracle
from tests.synth import FIXTURES, load_listing, shrink

State = dict[str, torch.Tensor]
Delta = Callable[[tuple[int, ...], np.random.Generator], np.ndarray]  # (shape, generator) -> ΔW


def tiny_base(dtype: torch.dtype = torch.float32) -> State:
    return {
        key: tensor.to(dtype)
        for key, tensor in load_file(FIXTURES / "tiny" / "base.safetensors").items()
    }


def small(family: str, dtype: torch.dtype = torch.float32, by: int = 32) -> State:
    """A checkpoint of any family with its widths divided, seeded, no VAE."""
    random = np.random.default_rng(5)
    keys = compile_checkpoint(family)
    listing = shrink(load_listing(FIXTURES / "checkpoints" / f"{family}.tsv"), by)
    return {
        key: torch.from_numpy(
            random.standard_normal(shape) / np.sqrt(max(1, int(np.prod(shape[1:]))))
        ).to(dtype)
        for key, (_, shape) in listing.items()
        if keys.parse(key) is not None
    }


def matrices(state: Mapping[str, torch.Tensor], *parts: str) -> list[str]:
    return [
        key
        for key, t in state.items()
        if t.ndim >= 2 and any(part in key for part in parts) and "embedding" not in key
    ]


def changed(state: State, keys: Iterable[str], delta: Delta) -> tuple[State, State]:
    """(tuned, ΔW): `delta(shape)` added in float64 to each of `keys`, then rounded to the state's dtype."""
    random = np.random.default_rng(3)
    deltas = {key: torch.from_numpy(delta(tuple(state[key].shape), random)) for key in keys}
    tuned = dict(state)
    for key, d in deltas.items():
        tuned[key] = (state[key].double() + d).to(state[key].dtype)
    return tuned, deltas


def lora_delta(rank: int, size: float = 0.05) -> Delta:
    def make(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        k = min(rank, shape[0], int(np.prod(shape[1:])))
        up, down = random.standard_normal((shape[0], k)), random.standard_normal((k, *shape[1:]))
        return size / np.sqrt(k * np.prod(shape[1:])) * oracle.lora(up, down, 1.0)

    return make


def lokr_delta(factor: int, rank: int | None = None, size: float = 0.05) -> Delta:
    def make(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        o, i, *kernel = shape
        (a, c), (b, d) = oracle.factorization(o, factor), oracle.factorization(i, factor)
        w2 = random.standard_normal((c, d, *kernel))
        if rank is not None:
            w2 = (
                random.standard_normal((c, rank)) @ random.standard_normal((rank, w2[0].size))
            ).reshape(w2.shape)
        return size / np.sqrt(np.prod(shape[1:])) * oracle.lokr(random.standard_normal((a, b)), w2)

    return make


def noise_delta(size: float = 0.05) -> Delta:
    return lambda shape, random: (
        size / np.sqrt(max(1, np.prod(shape[1:]))) * random.standard_normal(shape)
    )


def save(path: Path, state: State) -> Path:
    save_file(state, path, metadata={"format": "pt"})
    return path


def distance(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return float(sum((one[k].double() - two[k].double()).square().sum() for k in one).sqrt())
