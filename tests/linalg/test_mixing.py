"""Several differences made one, against the papers' definitions entry by entry in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptkit.linalg import mixing
from adaptkit.linalg.mixing import mix, thinned, trimmed


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """The largest ⌈density · n⌉ entries: one after the other, the first of equal ones."""
    order = sorted(range(delta.size), key=lambda n: (-abs(delta.flat[n]), n))
    result = np.zeros_like(delta)
    for n in order[: math.ceil(density * delta.size - 1e-12)]:
        result.flat[n] = delta.flat[n]
    return result


def elect(kept: list[np.ndarray]) -> np.ndarray:
    """TIES: the sign of the larger mass wins, and the entries that have it are averaged."""
    result = np.zeros_like(kept[0])
    for n in range(result.size):
        values = [one.flat[n] for one in kept if one.flat[n]]
        for_it, against = sum(v for v in values if v > 0), -sum(v for v in values if v < 0)
        if for_it != against:
            agreeing = [v for v in values if (v > 0) == (for_it > against)]
            result.flat[n] = sum(agreeing) / len(agreeing)
    return result


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(7, 9), (1, 5), (20, 1)])
def test_trimming_keeps_the_largest_entries_where_they_stand(
    density: float, shape: tuple[int, int]
) -> None:
    delta = drawn(*shape)
    assert np.array_equal(trimmed(delta, density).numpy(), trim(delta.numpy(), density))


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 18])
def test_the_first_of_equal_entries_stays(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "PIECE", piece)
    delta = torch.tensor([[2.0, -2.0, 2.0, 1.0]])
    assert trimmed(delta, 0.5).tolist() == [[2.0, -2.0, 0.0, 0.0]]
    assert trimmed(delta.mT, 0.6).flatten().tolist() == [2.0, -2.0, 2.0, 0.0]
    assert trimmed(torch.tensor([[1.0, 3.0, 1.0, 2.0, -1.0]]), 0.8).tolist() == [
        [1.0, 3.0, 1.0, 2.0, 0.0]
    ]


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_is_what_the_paper_says_of_three(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "PIECE", 5)
    deltas = [drawn(6, 8, seed=seed) * (1 + seed) for seed in range(3)]
    found = mix(deltas, "ties", density, ["a", "b", "c"])
    exact = elect([trim(delta.numpy(), density) for delta in deltas])
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-14)
    assert not np.allclose(exact, sum(delta.numpy() for delta in deltas))


def test_signs_of_equal_mass_cancel() -> None:
    found = mix([torch.tensor([[3.0, 1.0]]), torch.tensor([[-3.0, 1.0]])], "ties", 1.0, ["", ""])
    assert found.tolist() == [[0.0, 1.0]]


def test_magnitude_is_the_sum_of_what_is_trimmed() -> None:
    deltas = [drawn(6, 8, seed=seed) for seed in range(3)]
    found = mix(deltas, "magnitude", 0.4, ["a", "b", "c"])
    exact = sum(trim(delta.numpy(), 0.4) for delta in deltas)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-14)


def test_dare_drops_by_the_seed_of_each_and_makes_up_for_it() -> None:
    deltas = [drawn(30, 40, seed=seed) for seed in range(2)]
    one, two = (
        thinned(delta, 0.25, seed).numpy() for delta, seed in zip(deltas, "xy", strict=True)
    )
    for thin, delta in ((one, deltas[0].numpy()), (two, deltas[1].numpy())):
        kept = thin != 0
        assert 0.2 < kept.mean() < 0.3
        np.testing.assert_allclose(thin[kept], delta[kept] / 0.25, rtol=1e-14)
    assert ((one != 0) != (two != 0)).any(), "each difference has a mask of its own"
    np.testing.assert_allclose(mix(deltas, "dare", 0.25, "xy").numpy(), one + two, rtol=1e-14)
    np.testing.assert_allclose(mix(deltas, "dare-ties", 0.25, "xy").numpy(), elect([one, two]))


def test_what_is_dropped_depends_on_the_seed_alone() -> None:
    """Not on the values, nor on the shape: the entries of a matrix are drawn in their order."""
    mask = thinned(drawn(30, 40), 0.5, "seed") != 0
    assert torch.equal(thinned(drawn(30, 40, seed=1), 0.5, "seed") != 0, mask)
    assert torch.equal(thinned(drawn(40, 30), 0.5, "seed").reshape(30, 40) != 0, mask)
    assert not torch.equal(thinned(drawn(30, 40), 0.5, "seed2") != 0, mask)


def test_large_matrices_are_drawn_in_pieces_with_nothing_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixing, "CHUNK", 64)
    found = thinned(torch.ones(31, 13), 0.5, "a")
    shares = [(piece != 0).double().mean().item() for piece in found.flatten().split(64)]
    assert len(shares) == 7
    assert min(shares[:-1]) > 0.25
    assert max(shares[:-1]) < 0.75
    assert len({tuple(piece.tolist()) for piece in found.flatten().split(64)}) == 7


def test_no_seed_may_be_missing_and_no_method_made_up() -> None:
    deltas = [drawn(2, 2), drawn(2, 2)]
    with pytest.raises(ValueError, match="zip"):
        mix(deltas, "dare", 0.5, ["a"])
    with pytest.raises(ValueError, match="unknown method 'mean'"):
        mix(deltas, "mean", 0.5, ["a", "b"])
