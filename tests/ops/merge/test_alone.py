"""A merge by itself and the same merge beside others: the same bytes, whatever the others are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.ops import merge
from tests.ops import models

# rows of the layers are cut into many blocks of these, and those of a LoKr into others
BLOCK = 1 << 10
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_bytes_do_not_depend_on_the_other_merges(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("steps", "kernel"):
        monkeypatch.setattr(f"adaptkit.ops.merge.{module}.BLOCK", BLOCK)
    state = models.tiny_base(dtype)
    state[KEY] = torch.randn(96, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    kinds = ("lora", "lokr", "loha", "full")
    paths = {kind: adapter(tmp_path / f"{kind}.safetensors", kind, 96, 80) for kind in kinds}

    def plan(kind: str, name: str) -> merge.Plan:
        options = merge.Options(output=tmp_path / f"{name}-{kind}.safetensors", family="sd1")
        return merge.plan(base, [(paths[kind], 0.7)], options)

    for kind in kinds:
        merge.run(plan(kind, "alone"))
    merge.run_together([plan(kind, "beside") for kind in kinds])
    for kind in kinds:
        one, other = (tmp_path / f"{name}-{kind}.safetensors" for name in ("alone", "beside"))
        assert one.read_bytes() == other.read_bytes(), kind
