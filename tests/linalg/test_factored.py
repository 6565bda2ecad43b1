"""Products of two factors against dense float64 decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg import factored
from adaptkit.linalg.factored import factored_core, factored_svd, product_distance, product_inner
from adaptkit.linalg.lowrank import LowRank


def reconstructed(found: LowRank) -> np.ndarray:
    return ((found.u * found.s.unsqueeze(-2)) @ found.vh).double().numpy()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_factored_svd_is_exact_without_the_product(condition: float) -> None:
    random = np.random.default_rng(2)
    left = random.standard_normal((120, 16)) * np.geomspace(1, 1 / condition, 16)
    right = random.standard_normal((16, 90))
    found = factored_svd(torch.from_numpy(left), torch.from_numpy(right))
    sigma = np.linalg.svd(left @ right, compute_uv=False)[:16]
    np.testing.assert_allclose(found.s.numpy(), sigma, rtol=1e-7)
    np.testing.assert_allclose(reconstructed(found), left @ right, atol=1e-10)
    for k in (4, 12):
        kept = ((found.u[:, :k] * found.s[:k]) @ found.vh[:k]).numpy()
        best = np.sqrt((sigma[k:] ** 2).sum())
        assert np.linalg.norm(left @ right - kept) == pytest.approx(best, rel=1e-7)


def test_factored_svd_reveals_rank_and_survives_zeros() -> None:
    left, right = torch.randn(50, 4), torch.randn(4, 60)
    twice = factored_svd(torch.cat([left, left, torch.zeros(50, 2)], 1), torch.cat([right, right, torch.randn(2, 60)]))
    assert int((twice.s > 1e-6 * twice.s[0]).sum()) == 4
    torch.testing.assert_close(torch.from_numpy(reconstructed(twice)).float(), 2 * left @ right, rtol=1e-4, atol=1e-4)
    nothing = factored_svd(torch.zeros(3, 5, 2), torch.randn(3, 2, 6))
    assert not nothing.s.any()
    assert torch.isfinite(nothing.u).all()


def test_factored_svd_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's MPS has none: then by QR in float32."""
    left, right = torch.randn(50, 4), torch.randn(4, 60)
    expected = factored_svd(left, right).s
    monkeypatch.setattr(factored, "supports_float64", lambda _: False)
    torch.testing.assert_close(factored_svd(left, right).s, expected, rtol=1e-4, atol=1e-4)


def test_factored_svd_fixes_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(3, 50, 6), torch.randn(3, 6, 40)
    for float64 in (True, False):
        monkeypatch.setattr(factored, "supports_float64", lambda _, float64=float64: float64)
        found = factored_svd(left, right)
        assert (found.u.gather(-2, found.u.abs().argmax(-2, keepdim=True)) > 0).all()
        torch.testing.assert_close(torch.from_numpy(reconstructed(found)).float(), left @ right, rtol=1e-4, atol=1e-4)
        wide = factored_svd(torch.randn(3, 8), torch.randn(8, 5))
        assert (wide.u.shape, wide.s.shape, wide.vh.shape) == ((3, 8), (8,), (8, 5))


@pytest.mark.parametrize("float64", [True, False])
def test_core_keeps_the_best_of_each_rank(float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "supports_float64", lambda _: float64)
    random = np.random.default_rng(7)
    left = torch.from_numpy(random.standard_normal((60, 12)) * np.geomspace(1, 1e-2, 12))
    right = torch.from_numpy(random.standard_normal((12, 45)))
    core, dense = factored_core(left, right), (left @ right).numpy()
    sigma = np.linalg.svd(dense, compute_uv=False)[:12]
    for k in (1, 5, 12):
        up, down = core.kept(left, right, k)
        np.testing.assert_allclose(np.linalg.norm(up.numpy(), axis=0), np.sqrt(sigma[:k]), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(down.numpy(), axis=1), np.sqrt(sigma[:k]), rtol=1e-6)
        least = np.sqrt((sigma[k:] ** 2).sum())
        assert np.linalg.norm(dense - (up @ down).numpy()) == pytest.approx(least, rel=1e-7, abs=1e-8 * sigma[0])


def test_inner_and_distance_of_products() -> None:
    random = np.random.default_rng(3)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(random.standard_normal((40, rank))), torch.from_numpy(
            random.standard_normal((rank, 30))
        )

    one, two = factors(6), factors(9)
    a, b = (one[0] @ one[1]).numpy(), (two[0] @ two[1]).numpy()
    assert float(product_inner(one, two)) == pytest.approx((a * b).sum(), rel=1e-12)
    assert float(product_distance(one, two)) == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)


def test_distance_of_nearly_equal_products_is_not_lost_to_cancellation() -> None:
    random = np.random.default_rng(4)
    left, right = (torch.from_numpy(random.standard_normal(shape)) for shape in ((40, 6), (6, 30)))
    turn = torch.linalg.qr(torch.from_numpy(random.standard_normal((6, 6))))[0]
    norm = float((left @ right).square().sum())
    assert float(product_distance((left, right), (left @ turn, turn.T @ right))) < 1e-28 * norm
    moved = left + 1e-9 * torch.from_numpy(random.standard_normal((40, 6)))
    true = float(((moved - left) @ right).square().sum())
    assert float(product_distance((left, right), (moved, right))) == pytest.approx(true, rel=1e-5)
