"""A LoRA of real shapes: `python -m tests.benchmarks.lora OUT LISTING MODULES RANK`.

A program of its own, so that what it holds is not counted in the peak of the programs that are measured.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.synth import FIXTURES, load_listing


def write_lora(path: Path, listing: str, modules: str, rank: int) -> None:
    """A kohya LoRA of real shapes whose spectra fall off as those of trained ones do."""
    generator = torch.Generator().manual_seed(0)
    falloff = torch.arange(1, rank + 1).pow(-0.6)
    tensors: dict[str, torch.Tensor] = {}
    for key, (_, shape) in load_listing(FIXTURES / "keys" / listing).items():
        if not re.match(modules, key):
            continue
        if key.endswith("alpha"):
            tensors[key] = torch.tensor(rank / 2)
        elif "lora_down" in key:
            tensors[key] = (torch.randn(rank, *shape[1:], generator=generator) * 0.02).half()
        else:
            up = torch.randn(shape[0], rank, generator=generator) * falloff * 0.02
            tensors[key] = up.reshape(shape[0], rank, *shape[2:]).half()
    save_file(tensors, path)


if __name__ == "__main__":
    write_lora(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
