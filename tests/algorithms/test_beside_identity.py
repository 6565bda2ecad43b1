"""A difference as a LoRA of full rank: itself beside an identity, exact, and never multiplied out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.linalg.products import wide_blocks
from adaptkit.ops import convert

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (16, 4, 3, 3)])
def test_without_a_rank_a_difference_becomes_a_lora_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Singular vectors, rounded on both sides, lost up to 5e-4 of it in fp16 and 5e-3 in bf16."""
    name = NAME if len(shape) == 2 else CONV
    diff = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({f"{name}.diff": diff}, tmp_path / "full.safetensors")
    made = tmp_path / "lora.safetensors"
    options = convert.Options(algo="lora", family="sd1", to="kohya", output=made)
    with_plan = convert.plan(tmp_path / "full.safetensors", options)
    try:
        report = convert.run(with_plan)
    finally:
        with_plan.close()
    assert report.relative_error == 0.0
    state = load_file(made)
    up, down = state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"]
    rank = min(shape[0], int(np.prod(shape[1:])))
    assert up.dtype == down.dtype == dtype
    assert down.shape == (rank, *shape[1:])
    assert float(state[f"{name}.alpha"]) == rank
    product = up.flatten(1).double().numpy() @ down.flatten(1).double().numpy()
    np.testing.assert_array_equal(product, diff.flatten(1).double().numpy())


def test_with_a_rank_it_is_the_best_approximation_of_that_rank(tmp_path: Path) -> None:
    diff = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    save_file({f"{NAME}.diff": diff}, tmp_path / "full.safetensors")
    options = convert.Options(
        algo="lora", family="sd1", to="kohya", rank=5, output=tmp_path / "lora.safetensors"
    )
    plan = convert.plan(tmp_path / "full.safetensors", options)
    try:
        report = convert.run(plan)
    finally:
        plan.close()
    sigma = np.linalg.svd(diff.double().numpy(), compute_uv=False)
    least = np.sqrt((sigma[5:] ** 2).sum() / (sigma**2).sum())
    assert report.relative_error == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("spoiled", ["", "scaled", "beside", "moved"])
@pytest.mark.parametrize("side", [0, 1])
def test_blocks_beside_what_is_not_quite_an_identity_are_products(side: int, spoiled: str) -> None:
    draw = np.random.default_rng(0)
    matrix, eye = draw.standard_normal((6, 6)), np.eye(6)
    if spoiled == "scaled":
        eye[2, 2] = 2.0
    elif spoiled == "beside":
        eye[1, 4] = 1e-3
    elif spoiled == "moved":
        eye = eye[[1, 0, 2, 3, 4, 5]]
    pair = (eye, matrix) if side == 0 else (matrix, eye)
    left, right = (torch.from_numpy(x) for x in pair)
    found = torch.cat(list(wide_blocks(6, None, lambda: (left, right), lambda: left)))
    np.testing.assert_allclose(found.numpy(), pair[0] @ pair[1], rtol=0, atol=1e-15)
