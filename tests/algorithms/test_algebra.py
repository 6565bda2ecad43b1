"""Inner products and distances between kinds, where the paths part: cancellation, blocks, dense."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from adaptkit.algorithms._factor import Dense, Product
from adaptkit.algorithms.contract import Weights
from adaptkit.algorithms.full import Full
from adaptkit.algorithms.loha import Loha
from adaptkit.algorithms.lokr import Lokr
from adaptkit.algorithms.lora import Lora

DRAW = np.random.default_rng(0)


def inner(one: Weights, two: Weights) -> float:
    return one.inner_product(two)


def distance_squared(one: Weights, two: Weights, norm: float | None = None) -> float:
    return one.distance_squared(two, norm)


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(DRAW.standard_normal(shape))


def kinds() -> dict[str, tuple[Weights, np.ndarray]]:
    """Weights of 24 × 20, and ΔW by NumPy from the same numbers."""
    up, down = draw(24, 3), draw(3, 20)
    wide_up, wide_down = draw(24, 18), draw(18, 20)
    a, b, c, d = draw(24, 2), draw(2, 20), draw(24, 2), draw(2, 20)
    w1, w2, left, right = draw(4, 5), draw(6, 4), draw(6, 2), draw(2, 4)
    v1, v2 = draw(6, 4), draw(4, 5)
    diff = draw(24, 20)
    return {
        "lora": (Lora(up, down, 0.7), 0.7 * up.numpy() @ down.numpy()),
        "thick lora": (Lora(wide_up, wide_down, 1.0), wide_up.numpy() @ wide_down.numpy()),
        "loha": (
            Loha(Product(a, b), Product(c, d), 0.3),
            0.3 * (a.numpy() @ b.numpy()) * (c.numpy() @ d.numpy()),
        ),
        "lokr": (Lokr(Dense(w1), Dense(w2), 1.0), np.kron(w1.numpy(), w2.numpy())),
        "low lokr": (
            Lokr(Dense(w1 * 2), Product(left, right), -0.5),
            np.kron(-w1.numpy(), left.numpy() @ right.numpy()),
        ),
        "lokr of other blocks": (
            Lokr(Dense(v1), Dense(v2), 1.0),
            np.kron(v1.numpy(), v2.numpy()),
        ),
        "full": (Full(diff), diff.numpy()),
    }


KINDS = kinds()
PAIRS = list(itertools.product(KINDS, KINDS))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_every_pair_of_kinds_is_as_its_dense_matrices(one: str, two: str) -> None:
    (first, dense), (second, other) = KINDS[one], KINDS[two]
    scale = np.linalg.norm(dense) * np.linalg.norm(other)
    assert inner(first, second) == pytest.approx((dense * other).sum(), abs=1e-12 * scale)
    expected = ((dense - other) ** 2).sum()
    assert distance_squared(first, second) == pytest.approx(expected, rel=1e-11, abs=1e-20)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("change", [1e-3, 1e-7])
def test_a_small_distance_keeps_its_digits(name: str, change: float) -> None:
    """Norms cancel to the last digits there: the sum of three terms alone would be noise."""
    weights, dense = KINDS[name]
    near = weights.times(1 + change)
    exact = (change * np.linalg.norm(dense)) ** 2
    assert distance_squared(weights, near) == pytest.approx(exact, rel=1e-5, abs=0)
    assert distance_squared(near, weights) == pytest.approx(exact, rel=1e-5, abs=0)


def test_a_lora_near_a_lokr_is_measured_densely() -> None:
    lokr, dense = KINDS["low lokr"]
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    lora = Lora(torch.from_numpy(u[:, :8] * s[:8]), torch.from_numpy(vh[:8]), 1.0)
    change = torch.zeros_like(lora.up)
    change[3, 1] = 1e-6
    near = Lora(lora.up + change, lora.down, 1.0)
    exact = ((u[:, :8] * s[:8] + change.numpy()) @ vh[:8] - dense) ** 2
    assert distance_squared(lokr, near) == pytest.approx(exact.sum(), rel=1e-6, abs=0)
    assert distance_squared(near, lokr) == pytest.approx(exact.sum(), rel=1e-6, abs=0)


def test_a_norm_that_is_known_is_taken() -> None:
    first, _ = KINDS["lora"]
    second, _ = KINDS["loha"]
    told = first.norm_squared()
    plain = distance_squared(first, second)
    assert distance_squared(first, second, told) == pytest.approx(plain, rel=1e-12)
    assert distance_squared(first, second, told + 5.0) == pytest.approx(plain + 5.0, rel=1e-9)


def test_a_kronecker_product_with_thin_factors_is_never_made_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is what the formula is for: ΔW of an SDXL layer is a hundred times its factors."""

    def dense(_: Weights) -> torch.Tensor:
        raise AssertionError("ΔW was formed")

    monkeypatch.setattr(Weights, "_wide_blocks", dense)
    for one, two in itertools.product(("lora", "lokr", "low lokr"), repeat=2):
        (first, exact), (second, other) = KINDS[one], KINDS[two]
        assert inner(first, second) == pytest.approx((exact * other).sum(), rel=1e-9)
        assert distance_squared(first, second) == pytest.approx(
            ((exact - other) ** 2).sum(), rel=1e-9, abs=1e-18
        )
