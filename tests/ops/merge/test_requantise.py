"""Scaled weights a block at a time: the same numbers as numpy's, wherever groups and blocks end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.ops.merge import requantise
from adaptkit.ops.merge.requantise import Numbers, quantised

SCALES = [(), (1,), (6,), (6, 1), (6, 4, 1)]


@pytest.mark.parametrize("block", [1, 5, 7, 24, 30, 1000])
@pytest.mark.parametrize("shape", SCALES)
def test_every_number_is_decoded_once_by_its_own_scale(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requantise, "BLOCK", block)
    draw = torch.Generator().manual_seed(0)
    stored = torch.randn(6, 28, generator=draw).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=draw) + 0.5
    numbers = Numbers(stored, scale)
    places = list(numbers.places())
    assert [n for place in places for n in range(place.start, place.stop)] == list(range(6 * 28))
    assert max(place.stop - place.start for place in places) <= max(block, numbers.group)
    found = np.concatenate([numbers.at(place, torch.float32).numpy() for place in places])
    groups = stored.float().numpy().reshape(max(1, scale.numel()), -1)
    expected = groups * scale.numpy().reshape(-1, 1)
    np.testing.assert_array_equal(found, expected.reshape(-1))


@pytest.mark.parametrize("block", [5, 24, 1000])
@pytest.mark.parametrize("shape", SCALES)
def test_each_scale_brings_the_largest_of_its_group_to_the_end_of_the_format(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requantise, "BLOCK", block)
    wide = torch.randn(6, 28, generator=torch.Generator().manual_seed(1)) * 3
    wide[2] = 0.0
    scale = torch.ones(shape)
    out, fresh = quantised(wide, scale, "F8_E4M3")
    assert fresh.shape == scale.shape
    groups = wide.numpy().reshape(max(1, scale.numel()), -1)
    largest = np.abs(groups).max(1)
    expected = np.where(largest > 0, largest / np.float32(448), np.float32(1))
    np.testing.assert_array_equal(fresh.numpy().reshape(-1), expected)
    divided = torch.from_numpy(groups / expected[:, None]).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(
        out.float().numpy().reshape(groups.shape), divided.float().numpy()
    )
    kept = quantised(wide, torch.full(shape, 0.5), "BF16")
    assert torch.equal(kept[1], torch.full(shape, 0.5)), "a wider format needs no new scale"
    assert torch.equal(kept[0], (wide / 0.5).bfloat16())
