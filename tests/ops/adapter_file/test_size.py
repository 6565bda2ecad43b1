from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptkit.files.header import TensorSpec
from adaptkit.ops.adapter_file.size import exact_size, module_size

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def module(stem: str, rank: int, dtype: str) -> list[TensorSpec]:
    return [
        TensorSpec(f"{stem}.lora_down.weight", dtype, (rank, 320)),
        TensorSpec(f"{stem}.lora_up.weight", dtype, (640, rank)),
        TensorSpec(f"{stem}.alpha", "F32", ()),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_size_is_that_of_the_official_library(tmp_path: Path, dtype: str) -> None:
    found = [spec for n in range(3) for spec in module(f"{STEM}_{n}", 4 + n, dtype)]
    specs = sorted(found, key=lambda spec: (spec.dtype != "F32", spec.name))  # as that library does
    metadata = {"format": "pt", "ss_network_dim": "Dynamic", "title": "größe"}
    tensors = {spec.name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for spec in specs}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    # the official library pads its header with spaces to a multiple of 8
    assert abs(exact_size(specs, metadata) - (tmp_path / "a.safetensors").stat().st_size) < 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_the_size_of_a_module_is_about_what_it_adds_to_a_file(dtype: str, rank: int) -> None:
    others = [spec for n in range(40) for spec in module(f"{STEM}_{n}", 8, dtype)]
    one = module(f"{STEM}_40", rank, dtype)
    added = exact_size([*others, *one], {}) - exact_size(others, {})
    numbers = rank * (320 + 640)
    estimate = module_size(numbers, dtype, f"{STEM}_40", 2, alpha=True)
    # of the header a few bytes an entry are not known before all offsets are
    assert abs(estimate - added) <= 3 * 24
    without = exact_size([*others, *one[:2]], {}) - exact_size(others, {})
    estimate = module_size(numbers, dtype, f"{STEM}_40", 2, alpha=False)
    assert abs(estimate - without) <= 2 * 24
