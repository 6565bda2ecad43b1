"""Files that look like LoRAs of a model and are none: refused by name, with what works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptkit import ops
from adaptkit.errors import AdaptkitError, ShapeMismatch

SIDE = 64


def stability(path: Path) -> Path:
    """Names and shapes as in Stability AI's control-lora files, smaller."""
    tensors = {"lora_controlnet": torch.zeros(0)}
    for layer in (
        "1.0.emb_layers.1",
        "1.0.in_layers.2",
        "4.1.proj_in",
        "4.1.transformer_blocks.0.attn1.to_q",
    ):
        tensors[f"input_blocks.{layer}.up"] = torch.ones(SIDE, 4)
        tensors[f"input_blocks.{layer}.down"] = torch.ones(4, SIDE)
    for layer in ("time_embed.0", "label_emb.0.0", "middle_block.1.proj_in"):
        tensors[f"{layer}.up"], tensors[f"{layer}.down"] = torch.ones(SIDE, 4), torch.ones(4, SIDE)
    for name in ("zero_convs.0.0", "input_hint_block.0", "middle_block_out.0", "input_blocks.0.0"):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(4, 4, 3, 3), torch.ones(4)
    save_file(tensors, path)
    return path


def test_a_control_net_of_factors_is_refused_by_every_verb(tmp_path: Path) -> None:
    path, out = stability(tmp_path / "control.safetensors"), tmp_path / "out.safetensors"
    base = tmp_path / "base.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, base)
    record = ops.inspect.run(path).record
    assert "Control LoRA" in record["error"]
    assert "Load ControlNet Model" in record["hint"]
    for verb in (
        lambda: ops.convert.plan(path, ops.convert.Options(to="kohya", output=out)),
        lambda: ops.resize.plan(path, ops.resize.Options(rank=2, output=out)),
        lambda: ops.merge.plan(base, [(path, 1.0)], ops.merge.Options(output=out, family="sd1")),
        lambda: ops.combine.plan([(path, 1.0)] * 2, ops.combine.Options(output=out)),
    ):
        with pytest.raises(AdaptkitError, match="Control LoRA") as refused:
            verb()
        assert "no LoRA can stand for it" in (refused.value.hint or "")


def test_a_control_lora_of_flux_is_told_what_it_is_for(tmp_path: Path) -> None:
    path, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    stem = "transformer.x_embedder"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 128), f"{stem}.lora_B.weight": torch.ones(SIDE, 2)},
        path,
    )
    save_file({"img_in.weight": torch.ones(SIDE, 64)}, base)
    options = ops.merge.Options(output=tmp_path / "o.safetensors", family="flux")
    with pytest.raises(ShapeMismatch, match="64 × 64 in base.safetensors, 64 × 128") as refused:
        ops.merge.plan(base, [(path, 1.0)], options)
    assert "Control LoRA" in (refused.value.hint or "")
    save_file({"img_in.weight": torch.ones(SIDE, 128)}, base)
    plan = ops.merge.plan(base, [(path, 1.0)], options)
    assert len(plan.merges) == 1
    plan.close()


def test_factors_that_nunchaku_packs_in_no_public_way_are_refused_by_name(tmp_path: Path) -> None:
    """Fewer ranks than those of a base's own branch; see tests/files/test_arranged.py."""
    path = tmp_path / "a.safetensors"
    names = ("transformer_blocks.0.qkv_proj", "single_transformer_blocks.0.mlp_fc1")
    tensors = {
        f"{name}.lora_{end}": torch.ones(SIDE, 16) for name in names for end in ("down", "up")
    }
    save_file(tensors, path)
    record = ops.inspect.run(path).record
    assert "packed for nunchaku" in record["error"]
    with pytest.raises(AdaptkitError, match="packed for nunchaku") as refused:
        ops.convert.plan(path, ops.convert.Options(to="kohya", output=tmp_path / "o.safetensors"))
    assert "made from" in (refused.value.hint or "")
