"""combine --method mean: the average of checkpoints of one training, at their rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from adaptkit import ops
from adaptkit.adapter import Adapter
from adaptkit.errors import WrongUsage
from tests import made

RANK = 5


def combined(
    tmp_path: Path,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    kind: str = "lora",
    **options: object,
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    files = [
        (made.adapter(tmp_path / f"{n}.safetensors", kind, seed=n, rank=RANK), weight)
        for n, weight in enumerate(weights)
    ]
    output = tmp_path / "out.safetensors"
    given = ops.combine.Options(output=output, family="sd1", method="mean", **options)
    ops.combine.run(ops.combine.plan(files, given))
    return [made.deltas(path) for path, _ in files], made.deltas(output)


def cut(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_it_is_the_weighted_mean_at_the_rank_of_its_inputs(
    weights: tuple[float, ...], tmp_path: Path
) -> None:
    inputs, found = combined(tmp_path, weights)
    for name, delta in found.items():
        mean = sum(w * one[name] for w, one in zip(weights, inputs, strict=True)) / sum(weights)
        best = cut(mean, RANK)
        assert np.linalg.norm(delta - best) < 1e-3 * np.linalg.norm(mean)
    with Adapter.open(tmp_path / "out.safetensors") as adapter:
        assert {entry.facts.rank for entry in adapter.entries.values()} == {RANK}


def test_a_decay_makes_it_a_moving_average(tmp_path: Path) -> None:
    inputs, found = combined(tmp_path, decay=0.7, rank=3 * RANK)
    for name, delta in found.items():
        mean = inputs[0][name]
        for one in inputs[1:]:
            mean = 0.7 * mean + 0.3 * one[name]
        assert np.linalg.norm(delta - mean) < 1e-4 * np.linalg.norm(mean)


def test_full_differences_have_no_rank_to_keep(tmp_path: Path) -> None:
    inputs, found = combined(tmp_path, kind="full")
    for name, delta in found.items():
        np.testing.assert_allclose(delta, sum(one[name] for one in inputs) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ((1.0, -1.0), {}, "add up to 0"),
        ((1.0, 2.0), {"decay": 0.5}, "sets the weights"),
        ((1.0, 1.0), {"decay": 1.5}, "between 0 and 1"),
        ((1.0, 1.0), {"density": 0.5}, "no meaning for a mean"),
    ],
)
def test_what_is_no_mean_is_refused(
    weights: tuple[float, ...], options: dict[str, float], words: str, tmp_path: Path
) -> None:
    with pytest.raises(WrongUsage, match=words):
        combined(tmp_path, weights, **options)
