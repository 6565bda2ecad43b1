"""The biases beside a LoRA: the real readers find them under the names that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NotRepresentable
from adaptkit.ops import convert, resize

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ATTENTION = "transformer_blocks_0_attn"
Tensors = dict[str, torch.Tensor]


def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def adapter(path: Path, **extra: torch.Tensor) -> tuple[Path, Tensors]:
    """A LoRA with a bias, one without, and a bias alone; and the changes they mean."""
    tensors: Tensors = {}
    meant: Tensors = {}
    for name, alpha, rank in (("to_q", 3.0, 2), ("to_k", 1.0, 4)):
        up, down = torch.randn(16, rank), torch.randn(rank, 16)
        stem = f"lycoris_{ATTENTION}_{name}"
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        meant[f"transformer_blocks.0.attn.{name}.weight"] = up @ down * alpha / rank
    for name in ("to_q", "to_v"):
        bias = torch.randn(16)
        tensors[f"lycoris_{ATTENTION}_{name}.diff_b"] = bias
        meant[f"transformer_blocks.0.attn.{name}.bias"] = bias
    save_file(tensors | extra, path)
    return path, meant


def check(state: Tensors, meant: Tensors) -> None:
    for key, weight in model().state_dict().items():
        change = state[key] - weight
        wanted = meant.get(key, torch.zeros_like(weight))
        torch.testing.assert_close(change, wanted, atol=1e-4, rtol=1e-4, msg=key)


def test_diffusers_reads_them(tmp_path: Path) -> None:
    path, meant = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    report = convert.run(
        convert.plan(path, convert.Options(to="diffusers", family="flux", output=out))
    )
    assert report.relative_error is not None
    assert report.relative_error < 1e-6
    tuned = model()
    tuned.load_lora_adapter(load_file(out), prefix="transformer")
    tuned.fuse_lora()
    state = {k.replace(".base_layer", ""): v for k, v in tuned.state_dict().items()}
    check(state, meant)


@pytest.mark.parametrize("again", [False, True])
def test_peft_reads_them(tmp_path: Path, again: bool) -> None:
    path, meant = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out"
    convert.run(convert.plan(path, convert.Options(to="peft", family="flux", output=out)))
    if again:  # a folder is read as it was written
        chosen = resize.Options(rank=4, family="flux", output=tmp_path / "twice", dtype="fp32")
        resize.run(resize.plan(out, chosen))
        out = tmp_path / "twice"
    tuned = peft.PeftModel.from_pretrained(model(), str(out))
    check(tuned.merge_and_unload().state_dict(), meant)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_a_bias_beside_a_dora_is_refused(tmp_path: Path, to: str) -> None:
    """Neither reader builds a LoRA with magnitudes and a bias."""
    magnitude = {f"lycoris_{ATTENTION}_to_q.dora_scale": torch.ones(16, 1)}
    path, _ = adapter(tmp_path / "a.safetensors", **magnitude)
    with pytest.raises(NotRepresentable, match="bias"):
        convert.plan(path, convert.Options(to=to, family="flux", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
