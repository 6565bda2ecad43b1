"""What a LoRA of as many numbers would keep: all layers of a small model, some of a large one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.ops import extract
from adaptkit.ops.extract import fit, same_size
from adaptkit.ops.extract.same_size import SameSize, about_size

LAYERS = [(32, 16)] * 5 + [(16, 32)] * 3 + [(64, 16)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[np.ndarray]]:
    """A pair in float32 whose layers differ by numbers of their own size."""
    folder, draw = tmp_path_factory.mktemp("size"), np.random.default_rng(0)
    base, tuned, deltas = {}, {}, []
    for n, shape in enumerate(LAYERS):
        key = f"blocks.{n}.layer.weight"
        delta = draw.standard_normal(shape) * (n + 1) * 0.01
        deltas.append(delta)
        base[key] = torch.zeros(shape)
        tuned[key] = torch.from_numpy(delta).float()
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors", deltas


def run(pair: tuple[Path, Path, list[np.ndarray]], output: Path) -> extract.Report:
    options = extract.Options(algo="lokr", factor=4, output=output, device="cpu")
    plan = extract.plan(pair[0], pair[1], options)
    try:
        return extract.run(plan)
    finally:
        plan.close()


def kept(delta: np.ndarray) -> float:
    """By the best LoRA of as many numbers as a LoKr of factor 4."""
    rank = (16 + delta.size // 16) // sum(delta.shape)
    sigma = np.linalg.svd(delta, compute_uv=False)
    return float((sigma[:rank] ** 2).sum())


def test_all_layers_of_a_small_model(
    pair: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    report = run(pair, tmp_path / "o.safetensors")
    whole = sum(float((delta**2).sum()) for delta in pair[2])
    expected = sum(map(kept, pair[2])) / whole
    assert report.captured_by_lora_of_same_size == pytest.approx(expected, rel=5e-3)
    assert report.layers_compared_with_lora is None
    assert "layers_compared_with_lora" not in report.to_dict()
    assert all("captured_by_lora_of_same_size" in one for one in report.details)


def test_some_of_each_shape_of_a_large_one_weighed_by_all_of_it(
    pair: tuple[Path, Path, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_size, "ALL", sum(rows * columns for rows, columns in LAYERS) - 1)
    monkeypatch.setattr(same_size, "SHARE", 2)
    report = run(pair, tmp_path / "o.safetensors")
    shapes = {shape: [d for d in pair[2] if d.shape == shape] for shape in dict.fromkeys(LAYERS)}
    energy = {shape: [float((d**2).sum()) for d in some] for shape, some in shapes.items()}
    expected = sum(
        sum(energy[shape]) * sum(map(kept, some[::2])) / sum(energy[shape][::2])
        for shape, some in shapes.items()
    ) / sum(map(sum, energy.values()))
    assert report.captured_by_lora_of_same_size == pytest.approx(expected, rel=5e-3)
    assert report.layers_compared_with_lora == 3 + 2 + 1
    assert report.to_dict()["layers_compared_with_lora"] == 6
    looked = ["captured_by_lora_of_same_size" in one for one in report.details]
    assert sum(looked) == 6
    told = [note for note in report.notes if "LoRA of the same size" in note]
    assert not told or "(measured on 6 of 9 layers)" in told[0]


def test_a_rule_that_fits_layers_once_more_looks_at_no_more_of_them(
    pair: tuple[Path, Path, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_size, "ALL", 0)
    asked = []
    measured = fit._lora_of_rank
    monkeypatch.setattr(
        fit, "_lora_of_rank", lambda delta, rank: asked.append(rank) or measured(delta, rank)
    )
    options = extract.Options(
        algo="lokr", factor=4, energy=0.3, output=tmp_path / "o.safetensors", device="cpu"
    )
    plan = extract.plan(pair[0], pair[1], options)
    try:
        report = extract.run(plan)
    finally:
        plan.close()
    assert len(asked) == 3, "one layer of each shape"
    assert report.layers_compared_with_lora == 3


@pytest.mark.parametrize("captured", [0.2, 0.7])
def test_a_note_says_on_how_many_layers_it_rests(captured: float) -> None:
    (exact,) = about_size("LoKr", SameSize(captured, 0.834, 9, 9))
    assert "would keep 83.4%" in exact
    assert "measured" not in exact
    (rough,) = about_size("LoKr", SameSize(captured, 0.834, 3, 9))
    assert "would keep about 83% (measured on 3 of 9 layers)" in rough
    assert ("Use --algo lora here." in rough) == (captured < 0.5)
    assert not list(about_size("LoKr", SameSize(0.9, 0.834, 9, 9)))
