"""What a plain script does, to compare with: `python -m tests.benchmarks.obvious extract|stream|lost|merge|subtract …`. Written for this purpose.

Both state dicts whole in memory in float32, a full SVD of every difference, cut to the rank. `extract` decomposes one layer
of every shape and multiplies its time by the number of such layers (the whole takes minutes). Both files are loaded as a
whole, so the peak memory is that of the whole run less its results, which are small. With `--square` the SVD is asked for as
sd-scripts' `networks/extract_lora_from_models.py` asks: `torch.linalg.svd(mat)`, which also makes the square factor of the
longer side, of which the rank keeps some rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.benchmarks.pair import is_tuned_matrix


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def extract(base: Path, tuned: Path, rank: int, square: bool) -> dict[str, float]:
    started = time.perf_counter()
    first, second = load(base), load(tuned)
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensor in second.items():
        if is_tuned_matrix(name, tuple(tensor.shape)):
            shapes[tuple(tensor.shape)].append(name)
    loading = time.perf_counter() - started
    total, kept, norm = 0.0, 0.0, 0.0
    for names in shapes.values():
        started = time.perf_counter()
        delta = second[names[0]] - first[names[0]]
        u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=square)
        up = (u[:, : len(s)][:, :rank] * s[:rank].sqrt()).half().contiguous()
        down = (s[:rank].sqrt().unsqueeze(1) * vh[: len(s)][:rank]).half().contiguous()
        del up, down
        total += len(names) * (time.perf_counter() - started)
        kept += len(names) * float(s[:rank].double().square().sum())
        norm += len(names) * float(s.double().square().sum())
    layers = sum(map(len, shapes.values()))
    return {
        "loading": loading,
        "estimate": loading + total,
        "layers": layers,
        "sampled": len(shapes),
        "captured": kept / norm,
    }


def stream(base: Path, tuned: Path, output: Path, rank: int) -> dict[str, float]:
    """What a capable user writes: one difference at a time through torch's randomized SVD."""
    held = {}
    with safe_open(base, "pt") as first, safe_open(tuned, "pt") as second:
        for name in list(second.keys()):
            if not is_tuned_matrix(name, tuple(second.get_slice(name).get_shape())):
                continue
            delta = (second.get_tensor(name).float() - first.get_tensor(name).float()).flatten(1)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + 8, *delta.shape), niter=2)
            root = s[:rank].sqrt()
            held[f"{name}.up"] = (u[:, :rank] * root).half().contiguous()
            held[f"{name}.down"] = (v[:, :rank] * root).mT.half().contiguous()
    save_file(held, output)
    return {"layers": len(held) / 2}


def lost(base: Path, tuned: Path, output: Path) -> dict[str, float]:
    """The relative error of what `stream` wrote, over the layers in it."""
    norm = rest = 0.0
    with safe_open(base, "pt") as first, safe_open(tuned, "pt") as second:
        held = load_file(output)
        for name in {key.rpartition(".")[0] for key in held}:
            delta = (second.get_tensor(name).float() - first.get_tensor(name).float()).flatten(1)
            norm += float(delta.norm()) ** 2
            up, down = held[f"{name}.up"].float(), held[f"{name}.down"].float()
            rest += float(delta.addmm_(up, down, alpha=-1.0).norm()) ** 2
    return {"error": (rest / norm) ** 0.5}


def merge(base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Every layer of the adapter (kohya's names) added in float32; the whole of it, nothing extrapolated."""
    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint

    checkpoint, held = Checkpoint.open(base), load(base)
    places, entries, merged = checkpoint.targets(), Adapter.open(adapter).entries, 0
    state = load_file(adapter)
    for slot, entry in entries.items():
        pieces = checkpoint.locate(slot, places[slot.target])
        assert pieces is not None
        (piece,) = pieces
        roles = dict(entry.tensors())
        if {"up", "down"} - set(roles):
            continue  # a bias or norm
        weight = held[piece.name]
        up, down = state[roles["up"]].float().flatten(1), state[roles["down"]].float().flatten(1)
        held[piece.name] = weight + entry.facts.scale * (up @ down).reshape(weight.shape)
        merged += 1
    save_file(
        {name: tensor.half() for name, tensor in held.items()}, output, metadata={"format": "pt"}
    )
    return {"layers": merged}


def subtract(base: Path, tuned: Path) -> dict[str, float]:
    """Both files read tensor by tensor and subtracted in float32: the least that an extraction does."""
    with safe_open(base, "pt") as first, safe_open(tuned, "pt") as second:
        names = list(first.keys())
        norms = (
            float((second.get_tensor(key).float() - first.get_tensor(key).float()).norm())
            for key in names
        )
        return {"norm": sum(norm**2 for norm in norms) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["extract", "stream", "lost", "merge", "subtract"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--square", action="store_true")
    options = parser.parse_args()
    if options.what == "extract":
        found = extract(*options.files, options.rank, options.square)
    elif options.what == "stream":
        found = stream(*options.files, options.rank)
    else:
        found = {"lost": lost, "merge": merge, "subtract": subtract}[options.what](*options.files)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
