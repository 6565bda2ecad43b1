"""Modules of fused layers merged into checkpoints that store the layer in parts: the rows are exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NotRepresentable, ShapeMismatch
from adaptkit.ops import merge
from tests import oracle

N = 24
PARTS = [f"transformer_blocks.0.attn.to_{n}.weight" for n in "qkv"]
STEM = "lora_unet_double_blocks_0_img_attn_qkv"
MORE = {
    "transformer_blocks.0.attn.add_q_proj.weight": (N, N),
    "transformer_blocks.0.attn.to_add_out.weight": (N, N),
    "single_transformer_blocks.0.proj_mlp.weight": (4 * N, N),
    "x_embedder.weight": (N, 4),
}

Array = np.ndarray
draw = np.random.default_rng(11)


def checkpoint(path: Path) -> tuple[Path, Array]:
    """A diffusers transformer with q, k and v apart, and all three as one matrix."""
    shapes = dict.fromkeys(PARTS, (N, N)) | MORE
    state = {k: torch.from_numpy(draw.standard_normal(s)).float() for k, s in shapes.items()}
    save_file(state, path)
    return path, np.concatenate([state[k].double().numpy() for k in PARTS])


def adapter(path: Path, kind: str) -> tuple[Path, dict[str, Array]]:
    def normal(*size: int) -> Array:
        return draw.standard_normal(size).astype(np.float32)

    lora = {"lora_up.weight": normal(3 * N, 2), "lora_down.weight": normal(2, N)}
    tensors = {
        "lokr": {"lokr_w1": normal(2, 2), "lokr_w2": normal(3 * N // 2, N // 2)},
        "dora-in": lora | {"dora_scale": np.abs(normal(1, N))},
        "dora-out": lora | {"dora_scale": np.abs(normal(3 * N, 1))},
        "lora": lora,
    }[kind]
    save_file({f"{STEM}.{k}": torch.from_numpy(v) for k, v in tensors.items()}, path)
    return path, tensors


def expected(weight: Array, kind: str, t: dict[str, Array], strength: float) -> Array:
    if kind == "lokr":
        return weight + strength * np.kron(t["lokr_w1"], t["lokr_w2"])
    delta = t["lora_up.weight"].astype(float) @ t["lora_down.weight"]
    if kind == "lora":
        return weight + strength * delta
    axis = 1 if kind == "dora-in" else 0
    return weight + strength * (oracle.dora(weight, delta, t["dora_scale"], axis) - weight)


def merged(base: Path, output: Path, *adapters: tuple[Path, float]) -> Array:
    options = merge.Options(output=output, family="flux", verify=True, overwrite=True)
    merge.run(merge.plan(base, list(adapters), options))
    state = load_file(output)
    return np.concatenate([state[k].double().numpy() for k in PARTS])


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora-in", "dora-out"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_every_row_is_that_of_the_whole_layer(tmp_path: Path, kind: str, strength: float) -> None:
    base, weight = checkpoint(tmp_path / "base.safetensors")
    path, tensors = adapter(tmp_path / "a.safetensors", kind)
    found = merged(base, tmp_path / "out.safetensors", (path, strength))
    wanted = expected(weight, kind, tensors, strength)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_after_another_adapter_it_is_refused_with_a_hint_that_works(tmp_path: Path) -> None:
    base, weight = checkpoint(tmp_path / "base.safetensors")
    plain, one = adapter(tmp_path / "plain.safetensors", "lora")
    path, two = adapter(tmp_path / "a.safetensors", "dora-in")
    output = tmp_path / "out.safetensors"
    with pytest.raises(NotRepresentable, match=r"a\.safetensors.*all rows") as caught:
        merged(base, output, (plain, 1.0), (path, 1.0))
    assert "name this adapter first" in (caught.value.hint or "")
    assert not output.exists()
    found = merged(base, output, (path, 1.0), (plain, 1.0))
    wanted = expected(expected(weight, "dora-in", two, 1.0), "lora", one, 1.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_more_inputs_than_the_adapter_has_stay_as_they_are(
    tmp_path: Path, kernel: tuple[int, ...]
) -> None:
    """FLUX Fill and Control, and inpainting U-Nets: channels at the end of the first layer."""
    ones = (1,) * len(kernel)
    key, stem, family = (
        ("unet.conv_in.weight", "lora_unet_conv_in", "sd1")
        if kernel
        else ("x_embedder.weight", "lora_unet_img_in", "flux")
    )
    weight = torch.randn(N, 9, *kernel)
    state = {key.removeprefix("unet."): weight}
    if not kernel:
        state |= load_file(checkpoint(tmp_path / "whole.safetensors")[0])
        state[key] = weight
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    up, down = torch.randn(N, 2, *ones), torch.randn(2, 4, *kernel)
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, path)
    output = tmp_path / "out.safetensors"
    shared = {"output": output, "family": family, "verify": True}
    with pytest.raises(ShapeMismatch) as caught:
        merge.plan(base, [(path, 0.5)], merge.Options(**shared))  # type: ignore[arg-type]
    assert "--pad-inputs" in (caught.value.hint or "")
    options = merge.Options(pad_inputs=True, **shared)  # type: ignore[arg-type]
    report = merge.run(merge.plan(base, [(path, 0.5)], options))
    inputs = weight[0].numel() // 9
    assert any(f"changes {4 * inputs} of {9 * inputs} inputs" in note for note in report.notes)
    found = load_file(output)[key.removeprefix("unet.")]
    assert torch.equal(found[:, 4:], weight[:, 4:])
    delta = (up.flatten(1) @ down.flatten(1)).reshape(N, 4, *kernel)
    torch.testing.assert_close(found[:, :4], weight[:, :4] + 0.5 * delta)


def test_packed_weights_are_named_before_their_shapes_are_compared(tmp_path: Path) -> None:
    """nvfp4 packs two numbers into one byte: the shape says nothing about the layer."""
    base, _ = checkpoint(tmp_path / "base.safetensors")
    state = load_file(base)
    for key in PARTS:
        state[key] = torch.zeros(N, N // 2, dtype=torch.uint8)
        state[key.replace("weight", "weight_scale")] = torch.ones(N, 2)
        state[key.replace("weight", "weight_scale_2")] = torch.ones(())
    save_file(state, base)
    path, _ = adapter(tmp_path / "a.safetensors", "lora")
    with pytest.raises(NotRepresentable, match="stored as nvfp4"):
        merged(base, tmp_path / "out.safetensors", (path, 1.0))


def test_a_model_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    base, _ = checkpoint(tmp_path / "base.safetensors")
    tensors = {"lora_up.weight": torch.zeros(6 * N, 2), "lora_down.weight": torch.zeros(2, 2 * N)}
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.{key}": tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(ShapeMismatch, match="is 72 × 24 in base.safetensors, 144 × 48 in this"):
        merged(base, tmp_path / "out.safetensors", (path, 1.0))
