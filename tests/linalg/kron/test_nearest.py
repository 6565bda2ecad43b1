from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg import lowrank
from adaptkit.linalg.kron import nearest
from adaptkit.linalg.kron.blocks import (
    kron,
    rearrange,
)
from adaptkit.linalg.kron.lowrank import nearest_kron_lowrank
from adaptkit.linalg.kron.nearest import nearest_kron
from adaptkit.linalg.lowrank import SvdSpec
from tests import oracle

RANDOM = np.random.default_rng(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.standard_normal(shape))


@pytest.mark.parametrize(
    ("a", "b", "c", "d"), [(4, 4, 10, 12), (8, 2, 3, 50), (1, 1, 6, 7), (6, 7, 1, 1), (1, 5, 9, 2)]
)
def test_nearest_is_the_leading_singular_pair(a: int, b: int, c: int, d: int) -> None:
    x = tensor(a * c, b * d)
    found = nearest_kron(x, a, b)
    error = float((x - kron(found.w1, found.w2)).norm())
    assert error == pytest.approx(oracle.best_kron(x.numpy(), a, b), rel=1e-9, abs=1e-9)
    assert float(found.captured) == pytest.approx(float(x.square().sum()) - error**2, rel=1e-9)
    assert float(found.w1.square().mean()) == pytest.approx(
        float(found.w2.square().mean()), rel=1e-9
    )
    assert found.w1.flatten()[found.w1.abs().argmax()] > 0


def test_many_blocks_go_through_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    w1, w2 = tensor(6, 6), tensor(8, 8)
    x = kron(w1, w2) + 0.01 * tensor(48, 48)
    monkeypatch.setattr(nearest, "GRAM_SIDE", 8)
    error = float((x - kron(*(lambda k: (k.w1, k.w2))(nearest_kron(x, 6, 6)))).norm())
    assert error <= oracle.best_kron(x.numpy(), 6, 6) * 1.001


@pytest.mark.parametrize("a", [18, 30])  # more blocks than entries a block, and fewer
def test_lanczos_captures_what_the_gram_matrix_does(a: int) -> None:
    """White noise is the worst case: a product captures under 1 % of it, behind a flat spectrum."""
    x = tensor(540, 540).float()
    sigma = np.linalg.svd(rearrange(x, a, a).double().numpy(), compute_uv=False)[0]
    assert min(a * a, (540 // a) ** 2) > nearest.GRAM_SIDE
    captured = float(nearest_kron(x, a, a).captured)
    assert sigma**2 * 0.995 <= captured <= sigma**2 * (1 + 1e-6)
    r = rearrange(x, a, a)[None]
    stacked = lowrank._stacked(r, SvdSpec(nearest.STACK_RANK, method="lanczos")).u[
        0, :, 0
    ]  # what a GPU runs
    assert float((stacked @ r[0]).norm()) ** 2 >= sigma**2 * 0.995


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"5 × 6 does not divide into 2 × 2 blocks"):
        nearest_kron(tensor(5, 6), 2, 2)


def test_a_true_kronecker_product_is_recovered_in_float32() -> None:
    w1, w2 = tensor(8, 8).float(), tensor(40, 45).float()
    x = kron(w1, w2)
    found = nearest_kron(x, 8, 8)
    assert float((x - kron(found.w1, found.w2)).norm() / x.norm()) < 1e-6


def test_zero_and_batches() -> None:
    x = torch.stack([torch.zeros(12, 10, dtype=torch.float64), tensor(12, 10)])
    found = nearest_kron(x, 3, 2)
    assert float(found.captured[0]) == 0.0
    assert torch.equal(kron(found.w1, found.w2)[0], torch.zeros(12, 10, dtype=torch.float64))
    alone = nearest_kron(x[1], 3, 2)
    assert torch.equal(found.w1[1], alone.w1)
    low = nearest_kron_lowrank(x, 3, 2, 2)
    assert torch.isfinite(low.left).all()
    assert float(low.captured[0]) == 0.0
    unit = torch.zeros(3, 2, dtype=torch.float64)
    unit[0, 0] = 1.0
    assert torch.equal(found.w1[0], unit)
    assert torch.equal(low.w1[0], unit)
    none = nearest_kron_lowrank(x[:0], 3, 2, 2)
    assert (none.w1.shape, none.left.shape, none.right.shape) == ((0, 3, 2), (0, 4, 2), (0, 2, 5))
    assert nearest_kron(x[:0], 3, 2).captured.shape == (0,)


def test_the_stacked_form_of_accelerators_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.stack([torch.zeros(48, 60, dtype=torch.float64), *(tensor(48, 60) for _ in range(3))])
    x[3] = kron(tensor(4, 4), tensor(12, 2) @ tensor(2, 15))
    one = nearest_kron(x, 4, 4)
    monkeypatch.setattr(nearest, "one_by_one", lambda _: False)
    two = nearest_kron(x, 4, 4)
    for name in ("captured", "w1", "w2"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1e-38, 1e-24, 1e-13, 1e-9, 1e12, 1e30])
@pytest.mark.parametrize("rank", [None, 2])
def test_no_size_of_a_matrix_changes_its_factors(size: float, rank: int | None) -> None:
    """‖X‖⁴ leaves float32 below 1e-9: `extract --algo lokr --rank` wrote numbers of 1e15."""
    plain = tensor(24, 30).float()
    small = (plain.double() * size).float()

    def fitted(x: torch.Tensor) -> np.ndarray:
        if rank is None:
            full = nearest_kron(x, 4, 3)
            return np.kron(full.w1.double().numpy(), full.w2.double().numpy())
        low = nearest_kron_lowrank(x, 4, 3, rank)
        sizes = [float(f.square().mean().sqrt()) for f in (low.w1, low.left, low.right)]
        assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-5)
        w2 = low.left.double() @ low.right.double()
        return np.kron(low.w1.double().numpy(), w2.numpy())

    np.testing.assert_allclose(fitted(small) / size, fitted(plain), rtol=0, atol=2e-4)
