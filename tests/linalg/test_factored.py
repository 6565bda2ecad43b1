"""Products of two factors against dense float64 decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg import factored
from adaptkit.linalg.factored import factored_core, factored_svd
from adaptkit.linalg.lowrank import LowRank
from adaptkit.linalg.products import product_distance


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
    twice = factored_svd(
        torch.cat([left, left, torch.zeros(50, 2)], 1),
        torch.cat([right, right, torch.randn(2, 60)]),
    )
    assert int((twice.s > 1e-6 * twice.s[0]).sum()) == 4
    torch.testing.assert_close(
        torch.from_numpy(reconstructed(twice)).float(), 2 * left @ right, rtol=1e-4, atol=1e-4
    )
    nothing = factored_svd(torch.zeros(3, 5, 2), torch.randn(3, 2, 6))
    assert not nothing.s.any()
    assert torch.isfinite(nothing.u).all()


def test_factored_svd_fixes_signs() -> None:
    left, right = torch.randn(3, 50, 6), torch.randn(3, 6, 40)
    found = factored_svd(left, right)
    assert (found.u.gather(-2, found.u.abs().argmax(-2, keepdim=True)) > 0).all()
    torch.testing.assert_close(
        torch.from_numpy(reconstructed(found)).float(), left @ right, rtol=1e-4, atol=1e-4
    )
    wide = factored_svd(torch.randn(3, 8), torch.randn(8, 5))
    assert (wide.u.shape, wide.s.shape, wide.vh.shape) == ((3, 8), (8,), (8, 5))


def test_core_keeps_the_best_of_each_rank() -> None:
    random = np.random.default_rng(7)
    left = torch.from_numpy(random.standard_normal((60, 12)) * np.geomspace(1, 1e-2, 12))
    right = torch.from_numpy(random.standard_normal((12, 45)))
    core, dense = factored_core(left, right), (left @ right).numpy()
    sigma = np.linalg.svd(dense, compute_uv=False)[:12]
    for k in (1, 5, 12):
        up, down = core.kept(left, right, k)
        np.testing.assert_allclose(
            np.linalg.norm(up.numpy(), axis=0), np.sqrt(sigma[:k]), rtol=1e-6
        )
        np.testing.assert_allclose(
            np.linalg.norm(down.numpy(), axis=1), np.sqrt(sigma[:k]), rtol=1e-6
        )
        least = np.sqrt((sigma[k:] ** 2).sum())
        assert np.linalg.norm(dense - (up @ down).numpy()) == pytest.approx(
            least, rel=1e-7, abs=1e-8 * sigma[0]
        )


@pytest.mark.parametrize("side", [0, 1])
def test_one_equal_factor_leaves_the_whole_change_to_the_other(side: int) -> None:
    """Thirteen digits below the product, where Gram matrices and triangles have none left."""
    random = np.random.default_rng(8)
    one = [random.standard_normal((40, 6)), random.standard_normal((6, 30))]
    two = [factor.copy() for factor in one]
    two[side][2, 3] += np.spacing(np.abs(two[side][2, 3])) * 64  # exact in float64
    change = two[side] - one[side]
    exact = ((change @ one[1] if side == 0 else one[0] @ change) ** 2).sum()
    found = product_distance(
        tuple(torch.from_numpy(factor) for factor in one),  # type: ignore[arg-type]
        tuple(torch.from_numpy(factor) for factor in two),  # type: ignore[arg-type]
    )
    assert float(found) == pytest.approx(exact, rel=1e-12, abs=0)


def test_a_stack_has_gram_matrices_only_where_every_member_has() -> None:
    left, right = torch.randn(2, 20, 3), torch.randn(2, 3, 15)
    with_grams = list(factored_core(left, right).members())
    without = [factored.Core(core.left, core.s, core.right) for core in with_grams]
    whole = factored.Core.stack(with_grams, [3, 2])
    assert whole.grams is not None
    exact = ((left @ right).double() ** 2).sum((1, 2))
    torch.testing.assert_close(whole.energy, exact, rtol=1e-5, atol=0)
    for cores in ([with_grams[0], without[1]], without):
        assert factored.Core.stack(cores, [3, 2]).grams is None
    assert whole.nbytes == 8 * (2 * (9 + 3 + 9) + 2 * 2 * 9)
    assert factored.Core.stack(without, [3, 2]).nbytes == 8 * 2 * (9 + 3 + 9)


def stored_as(
    factors: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return factors[0].to(dtype).float(), factors[1].to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_loss_of_a_stack_is_what_float64_measures(dtype: torch.dtype, condition: float) -> None:
    """Members are cut to ranks of their own; where float32 cannot tell the loss, there is no answer, never a wrong one."""
    random = np.random.default_rng(11)
    left = random.standard_normal((5, 300, 16)) * np.geomspace(1, 1 / condition, 16)
    left = left @ random.standard_normal((16, 16))  # no column is short by itself
    right = random.standard_normal((5, 16, 200))
    factors = torch.from_numpy(left).float(), torch.from_numpy(right).float()
    whole = factored_core(*factors)
    ranks = [1, 3, 8, 12, 16]
    core = factored.Core.stack([one.head(16) for one in whole.members()], ranks)
    kept = core.kept(*factors, 16)
    stored = stored_as(kept, dtype)
    for n, rank in enumerate(ranks):
        assert not kept[0][n, :, rank:].any()
        assert not kept[1][n, rank:].any()
    dense = (factors[0].double() @ factors[1].double()).numpy()
    measured = ((dense - (stored[0].double() @ stored[1].double()).numpy()) ** 2).sum((1, 2))
    found = core.distances(factors, kept, stored).numpy()
    told = np.isfinite(found)
    np.testing.assert_allclose(found[told], measured[told], rtol=1e-6)
    assert told[:3].all() or condition > 1.0
    assert not told[4] or dtype == torch.bfloat16, "a loss by rounding alone is left to float64"
    moved = core.distances(factors, kept, (stored[0] * 1.001, stored[1])).numpy()
    assert not np.allclose(moved[told], measured[told], rtol=1e-6), "what is stored is looked at"


def test_nan_is_never_a_loss() -> None:
    factors = torch.randn(2, 50, 4), torch.randn(2, 4, 60)
    core = factored.Core.stack(list(factored_core(*factors).members()), [2, 2])
    kept = core.kept(*factors, 2)
    broken = kept[0].clone()
    broken[1, 3, 0] = torch.nan
    found = core.distances(factors, kept, (broken, kept[1]))
    assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("closeness", [1e-1, 1e-3, 1e-5])
def test_a_product_whose_terms_cancel_is_left_to_float64(closeness: float) -> None:
    """Two columns nearly alike, their rows nearly opposite: float32 products lose what the first digits cancel."""
    random = np.random.default_rng(5)
    a, b = random.standard_normal((2, 300, 1))
    c, d = random.standard_normal((2, 1, 200))
    left = torch.from_numpy(np.concatenate([a, a + closeness * b], 1)).float()[None]
    right = torch.from_numpy(np.concatenate([c, closeness * d - c])).float()[None]
    core = factored.Core.stack(list(factored_core(left, right).members()), [1])
    kept = core.kept(left, right, 1)
    stored = stored_as(kept, torch.float16)
    measured = float(
        (left.double() @ right.double() - stored[0].double() @ stored[1].double()).square().sum()
    )
    found = float(core.distances((left, right), kept, stored))
    assert np.isnan(found) == (closeness < 1e-2)
    assert np.isnan(found) or found == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6, 12, 16])
def test_no_bit_of_a_core_depends_on_what_else_is_in_the_stack(rank: int) -> None:
    """Also not where a singular member is decomposed another way than the others."""
    draw = torch.Generator().manual_seed(rank)
    left = torch.randn(6, 90, rank, generator=draw)
    right = torch.randn(6, rank, 70, generator=draw)
    left[2, :, rank // 2 :], left[4] = left[2, :, :1] * 3, 0.0
    whole = factored_core(left, right)
    for n, core in enumerate(whole.members()):
        alone = factored_core(left[n : n + 1].clone(), right[n : n + 1].clone())
        for name in ("left", "s", "right", "grams"):
            assert torch.equal(getattr(core, name), getattr(alone, name)[0]), (n, name)


@pytest.mark.parametrize("grade", [1e1, 1e4, 1e6])
def test_how_a_term_is_shared_between_the_factors_makes_no_difference(
    grade: float,
) -> None:
    """Columns graded by grade² in one factor and the other way in the other: equal terms.

    `resize --rank 7` kept the wrong seven of eight at 1e4: error .453, where .278 is possible.
    """
    random = np.random.default_rng(4)
    left, right = random.standard_normal((80, 8)), random.standard_normal((8, 70))
    sigma = np.linalg.svd(left @ right, compute_uv=False)[:8]
    graded = np.ones(8)
    graded[0], graded[1] = grade, 1 / grade
    up = torch.from_numpy(left * graded).float()
    down = torch.from_numpy(right / graded[:, None]).float()
    core = factored_core(up, down)
    np.testing.assert_allclose(core.s.numpy(), sigma, rtol=1e-5)
    kept = core.head(7).kept(up, down, 7)
    true = up.double().numpy() @ down.double().numpy()
    error = np.linalg.norm(true - kept[0].double().numpy() @ kept[1].double().numpy())
    assert error == pytest.approx(sigma[7], rel=1e-4)
    found = core.head(7).distances((up, down), kept, kept)
    assert float(found) == pytest.approx(error**2, rel=1e-4), "no digits cancel"
