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


def test_rows_left_over_by_blocks_round_as_they_do_alone(tmp_path: Path) -> None:
    """A 3×3 convolution of SD 1.5: blocks of 91 rows leave 3 over, multiples of a LoKr's 80 leave none."""
    draw = torch.Generator().manual_seed(0)
    base = {"blocks.0.conv.weight": torch.randn(640, 640, 3, 3, generator=draw) / 76}
    name = "transformer.blocks.0.conv"
    lora = {
        f"{name}.lora_up.weight": torch.randn(640, 16, 1, 1, generator=draw) * 0.01,
        f"{name}.lora_down.weight": torch.randn(16, 640, 3, 3, generator=draw) * 0.05,
    }
    lokr = {
        f"{name}.lokr_w1": torch.randn(8, 8, generator=draw) * 0.1,
        f"{name}.lokr_w2": torch.randn(80, 80, 3, 3, generator=draw) * 0.01,
    }
    for file, tensors in (("base", base), ("lora", lora), ("lokr", lokr)):
        save_file(tensors, tmp_path / f"{file}.safetensors", {"format": "pt"})

    def plan(kind: str, name: str) -> merge.Plan:
        options = merge.Options(output=tmp_path / f"{name}-{kind}.safetensors")
        adapters = [(tmp_path / f"{kind}.safetensors", 1.0)]
        return merge.plan(tmp_path / "base.safetensors", adapters, options)

    merge.run(plan("lora", "alone"))
    merge.run_together([plan(kind, "beside") for kind in ("lora", "lokr")])
    one, other = (tmp_path / f"{name}-lora.safetensors" for name in ("alone", "beside"))
    assert one.read_bytes() == other.read_bytes()
