"""The usual way: `python -m tests.benchmarks.dense_resize IN OUT RANK` takes the SVD of every full product.

What sd-scripts' `resize_lora.py` does with its default options, without its statistics. Prints the seconds of its loop.
"""

from __future__ import annotations

import sys
import time

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    source, target, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    weights = load_file(source)
    names = [
        key.removesuffix(".lora_up.weight") for key in weights if key.endswith(".lora_up.weight")
    ]
    result: dict[str, torch.Tensor] = {}
    started = time.perf_counter()
    for name in names:
        up, down = (
            weights[f"{name}.lora_up.weight"].float(),
            weights[f"{name}.lora_down.weight"].float(),
        )
        scale = float(weights[f"{name}.alpha"]) / down.shape[0]
        u, s, vh = torch.linalg.svd(up.flatten(1) @ down.flatten(1))
        left, right = u[:, :rank] @ torch.diag(s[:rank]) * scale, vh[:rank]
        result[f"{name}.lora_up.weight"] = (
            left.reshape(up.shape[0], rank, *up.shape[2:]).half().contiguous()
        )
        result[f"{name}.lora_down.weight"] = (
            right.reshape(rank, *down.shape[1:]).half().contiguous()
        )
        result[f"{name}.alpha"] = torch.tensor(float(rank))
    spent = time.perf_counter() - started
    save_file(result, target)
    print(spent)


if __name__ == "__main__":
    main()
