from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.ops import merge
from adaptkit.ops.merge import steps
from tests import oracle
from tests.synth import FIXTURES

KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def lokr(path: Path, height: int, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Write a LoKr of blocks `height` rows high; its ΔW in float64."""
    w1 = draw.standard_normal((shape[0] // height, 2))
    w2 = draw.standard_normal((height, shape[1] // 2))
    tensors = {f"{NAME}.lokr_w1": w1, f"{NAME}.lokr_w2": w2, f"{NAME}.alpha": np.float64(1.0)}
    save_file(
        {key: torch.tensor(value, dtype=torch.float32) for key, value in tensors.items()}, path
    )
    return oracle.lokr(np.float64(np.float32(w1)), np.float64(np.float32(w2)))


@pytest.mark.share(2)
@pytest.mark.parametrize("heights", [(8, 4), (4, 8), (16, 2), (8, 8)])
def test_lokr_of_different_block_heights_on_one_layer_are_cut_where_both_may_be(
    tmp_path: Path, heights: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows as small as may be, so that a wrong cut shows."""
    base = load_file(FIXTURES / "tiny" / "base.safetensors")
    shape = tuple(base[KEY].shape)
    assert shape[0] % 16 == 0
    monkeypatch.setattr(steps, "BLOCK", 1)
    draw = np.random.default_rng(2)
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    deltas = [lokr(path, height, shape, draw) for path, height in zip(paths, heights, strict=True)]
    strengths = (0.5, -0.75)
    target = merge.Options(output=tmp_path / "merged.safetensors", dtype="fp32")
    merge.run(
        merge.plan(
            FIXTURES / "tiny" / "base.safetensors",
            list(zip(paths, strengths, strict=True)),
            target,
        )
    )
    wanted = base[KEY].double().numpy() + sum(s * d for s, d in zip(strengths, deltas, strict=True))
    found = load_file(tmp_path / "merged.safetensors")[KEY].double().numpy()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
