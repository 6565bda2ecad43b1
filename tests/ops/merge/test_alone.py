"""A merge by itself and the same merge beside others: the same bytes, whatever the others are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.ops import merge
from adaptkit.ops.merge import kernel
from tests.ops import models

# the rows of the layer are cut into many blocks: few rows are rounded otherwise than many
BLOCK = 3 * 80
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
KINDS = ("lora", "lokr", "loha", "full")
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def adapter(path: Path, kind: str, rows: int, columns: int) -> Path:
    draw = np.random.default_rng(len(kind))
    shapes = {
        "lora": {"lora_up.weight": (rows, 4), "lora_down.weight": (4, columns)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, columns // 4)},
        "loha": {
            "hada_w1_a": (rows, 4), "hada_w1_b": (4, columns),
            "hada_w2_a": (rows, 4), "hada_w2_b": (4, columns),
        },
        "full": {"diff": (rows, columns)},
    }[kind]  # fmt: skip
    tensors = {
        f"{STEM}.{role}": torch.from_numpy(0.1 * draw.standard_normal(shape)).float()
        for role, shape in shapes.items()
    }
    save_file(tensors, path)
    return path


Blocks = dict[str, list[tuple[int, int]]]


def merged(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Path, Blocks]]:
    """Merges of one layer by all kinds, alone and together: the files, and the rows of each ΔW."""
    monkeypatch.setattr("adaptkit.ops.merge.steps.BLOCK", BLOCK)
    found: Blocks = {}
    delta = kernel.Part.delta

    def seen(part: kernel.Part, first: int, last: int) -> torch.Tensor:
        found.setdefault(type(part.weights).name, []).append((first, last))
        return delta(part, first, last)

    monkeypatch.setattr(kernel.Part, "delta", seen)
    state = models.tiny_base(dtype)
    state[KEY] = torch.randn(96, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    base = folder / "base.safetensors"
    save_file(state, base)
    paths = {kind: adapter(folder / f"{kind}.safetensors", kind, 96, 80) for kind in KINDS}

    def plan(kind: str, name: str) -> merge.Plan:
        (folder / name).mkdir(exist_ok=True)
        options = merge.Options(output=folder / name / f"{kind}.safetensors", family="sd1")
        return merge.plan(base, [(paths[kind], 0.7)], options)

    for kind in KINDS:
        merge.run(plan(kind, "alone"))
    alone = dict(found)
    found.clear()
    merge.run_together([plan(kind, "beside") for kind in KINDS])
    return {"alone": (folder / "alone", alone), "beside": (folder / "beside", found)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_bytes_do_not_depend_on_the_other_merges(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = merged(tmp_path, dtype, monkeypatch)
    for kind in KINDS:
        one, other = (folder / f"{kind}.safetensors" for folder, _ in made.values())
        assert one.read_bytes() == other.read_bytes(), kind


def test_the_blocks_do_not_depend_on_the_other_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every processor's products show by their bytes in how many rows they were computed."""
    made = merged(tmp_path, torch.float32, monkeypatch)
    assert made["alone"][1] == made["beside"][1]
    cuts = made["alone"][1]
    assert set(cuts) == set(KINDS)
    assert min(map(len, cuts.values())) > 1
