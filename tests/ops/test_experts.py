"""Wan 2.2 has two experts: one file holds both under diffusers' names, and one each elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import AdaptkitError, NotRepresentable, Unclaimed

BLOCKS = 4
PARTS = ("transformer", "transformer_2")


def factors(seed: int) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(seed)
    return {
        f"blocks.{i}.{{q}}.{name}.weight": torch.from_numpy(
            draw.standard_normal(size).astype(np.float32)
        )
        for i in range(BLOCKS)
        for name, size in (("lora_A", (1, 5120)), ("lora_B", (5120, 1)))
    }


def stored(seed: int, prefix: str, q: str) -> dict[str, torch.Tensor]:
    return {prefix + key.format(q=q): value for key, value in factors(seed).items()}


def alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("to", ["comfy", "kohya"])
def test_one_expert_is_taken_out(number: int, to: str, tmp_path: Path) -> None:
    both = tmp_path / "both.safetensors"
    save_file(
        {k: v for n in range(2) for k, v in stored(n, f"{PARTS[n]}.", "attn1.to_q").items()}, both
    )
    output = tmp_path / "one.safetensors"
    options = ops.convert.Options(to=to, output=output, only=(f"{PARTS[number]}.*",))
    ops.convert.run(ops.convert.plan(both, options))
    found = load_file(output)
    if to == "comfy":
        assert alike(found, stored(number, "diffusion_model.", "self_attn.q"))
    else:
        assert {key.partition(".")[0] for key in found} == {
            f"lora_unet_blocks_{i}_self_attn_q" for i in range(BLOCKS)
        }
    with pytest.raises(Unclaimed, match="transformer_2"):
        ops.convert.plan(both, ops.convert.Options(to=to, output=tmp_path / "x.safetensors"))


def test_two_files_are_joined(tmp_path: Path) -> None:
    files = []
    for n in range(2):
        files.append((tmp_path / f"{n}.safetensors", 1.0))
        save_file(stored(n, "diffusion_model.", "self_attn.q"), files[n][0])
    output = tmp_path / "both.safetensors"
    options = ops.combine.Options(output=output, to="diffusers", into=PARTS)
    ops.combine.run(ops.combine.plan(files, options))
    expected = {k: v for n in range(2) for k, v in stored(n, f"{PARTS[n]}.", "attn1.to_q").items()}
    assert alike(load_file(output), expected)


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(stored(0, "diffusion_model.", "self_attn.q"), path)
    output = tmp_path / "out.safetensors"
    for into, words in (
        (("transformer",), "1 components for 2"),
        (("transformer", "transformer_3"), "transformer_3"),
    ):
        options = ops.combine.Options(output=output, to="diffusers", into=into)
        with pytest.raises(AdaptkitError, match=words):
            ops.combine.plan([(path, 1.0), (path, 1.0)], options)
    sdxl = tmp_path / "te.safetensors"
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {
            f"{stem}.lora_down.weight": torch.ones(1, 768),
            f"{stem}.lora_up.weight": torch.ones(3072, 1),
        },
        sdxl,
    )
    options = ops.combine.Options(output=output, family="sdxl", into=("unet", "unet"))
    with pytest.raises(NotRepresentable, match="text_encoder has other modules than unet"):
        ops.combine.plan([(sdxl, 1.0), (sdxl, 1.0)], options)
