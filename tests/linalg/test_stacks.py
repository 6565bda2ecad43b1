"""What accelerators compute of stacks: the same promises as of single matrices, at a fixed number of looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg import lowrank, split, stacks
from adaptkit.linalg.hosted import coefficients, fetched, leading_pairs
from adaptkit.linalg.lowrank import LowRank, SvdSpec
from adaptkit.linalg.precision import norm_squared
from tests.linalg.test_krylov import spectra


def drawn(m: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    one, two = (np.linalg.qr(draw.standard_normal((side, n)))[0] for side in (m, n))
    return one, two


@pytest.mark.parametrize(("m", "n", "rank"), [(300, 256, 16), (420, 320, 40)])
def test_the_error_is_within_a_thousandth_of_the_least_on_spectra_that_mislead(
    m: int, n: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, v = drawn(m, n, rank)
    named = {name: np.sort(values)[::-1] for name, values in spectra(n, rank).items()}
    exact = np.stack([(u * sigma) @ v.T for sigma in named.values()])
    alone: list[LowRank] = []
    single = lowrank.truncated_svd
    monkeypatch.setattr(
        lowrank, "truncated_svd", lambda *given: alone.append(single(*given)) or alone[-1]
    )
    found = lowrank._stacked(torch.from_numpy(exact).float(), SvdSpec(rank, method="lanczos"))
    low = ((found.u * found.s.unsqueeze(-2)) @ found.vh).double().numpy()
    for name, a, mine, told in zip(named, exact, low, found.residual, strict=True):
        least = np.sqrt((named[name][rank:] ** 2).sum())
        error = np.linalg.norm(a - mine)
        assert error <= 1.001 * least + 3e-7 * np.linalg.norm(a), name
        assert float(told) ** 0.5 == pytest.approx(error, rel=1e-3, abs=1e-6), name
    assert len(alone) <= 2, "only residuals that rounding hides are computed singly"


def test_odd_members_are_computed_by_themselves_and_the_others_are_not() -> None:
    u, v = drawn(200, 160, 0)
    plain = torch.from_numpy((u * np.arange(1, 161) ** -0.7) @ v.T).float()
    flat = torch.from_numpy(u[:, :6] @ v[:, :6].T).float()  # rank 6: nothing but rounding is left
    stack = torch.stack([plain, plain * 1e-14, plain * 1e14, torch.zeros_like(plain), flat])
    found = stacks.leading_triplets(stack, 8, 0, whole=False)
    assert found.good.tolist() == [True, False, False, True, False]
    whole = lowrank._stacked(stack, SvdSpec(8, method="lanczos"))
    for n, scale in ((1, 1e-14), (2, 1e14)):
        torch.testing.assert_close(whole.s[n], whole.s[0] * scale, rtol=1e-4, atol=0)
    assert not whole.s[3].any()
    assert torch.isfinite(whole.u).all()
    assert float(whole.residual[4]) < 1e-11 * 6


def test_members_do_not_influence_each_other() -> None:
    u, v = drawn(220, 200, 1)
    one, two = (torch.from_numpy((u * np.arange(1, 201) ** -p) @ v.T).float() for p in (0.3, 1.5))
    broken = torch.full_like(one, float("nan"))
    together = stacks.leading_triplets(torch.stack([one, broken, two]), 10, 0, whole=False)
    assert together.good.tolist() == [True, False, True]
    alone = stacks.leading_triplets(two[None], 10, 0, whole=False)
    torch.testing.assert_close(together.s[2], alone.s[0], rtol=1e-5, atol=0)


def test_energies_alone_are_those_of_the_space() -> None:
    u, v = drawn(300, 256, 2)
    sigma = np.hypot(1 / np.arange(1.0, 257), 0.02)
    stack = torch.from_numpy((u * sigma) @ v.T).float()[None]
    asked = stacks.asked_energies(stack, 20, 0)
    found = asked.told(*fetched(norm_squared(stack), *asked.numbers))
    assert (found[0].numpy() <= sigma[:20] ** 2 * (1 + 1e-5)).all()
    np.testing.assert_allclose(found[0].sum(), (sigma[:20] ** 2).sum(), rtol=2e-3)


@pytest.mark.parametrize("rank", [1, 2, 12, 40])
def test_rough_energies_are_near_the_best_on_spectra_that_mislead(rank: int) -> None:
    """Within 0.5 % of the error, or 3e-5 of ‖A‖² where that is small, which three digits hide."""
    side, i = 320, np.arange(1.0, 321)
    named = spectra(side, rank) | {f"power {p}": i**-p for p in (0.7, 1.5)}
    named["white"] = np.linalg.svd(np.random.default_rng(0).standard_normal((side, side)))[1]
    squares = np.stack([np.sort(values)[::-1] ** 2 for values in named.values()])
    u, v = drawn(400, side, rank)
    stack = torch.from_numpy((u * np.sqrt(squares)[:, None]) @ v.T).float()
    assert stacks.suits(rank, side, rough=True)
    asked = lowrank.energies_asked(stack, SvdSpec(rank, tol=lowrank.LOOSE))
    found = asked.told(*fetched(norm_squared(stack), *asked.numbers)).sum(-1).numpy()
    best, whole = squares[:, :rank].sum(1), squares.sum(1)
    for name, mine, most, total in zip(named, found, best, whole, strict=True):
        assert -1e-7 * total < most - mine < max(0.005 * (total - most), 3e-5 * total), name


def test_rough_energies_of_odd_members_are_left_to_others() -> None:
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(200, 160, generator=draw)
    low = torch.randn(200, 2, generator=draw) @ torch.randn(2, 160, generator=draw)
    stack = torch.stack([one, one * 1e-9, torch.full_like(one, torch.nan), low, 0 * one])
    asked = stacks.asked_energies(stack, 2, 0, rough=True)
    found = asked.told(*fetched(norm_squared(stack), *asked.numbers)).sum(-1)
    assert found.isnan().tolist() == [False, True, True, False, False]
    torch.testing.assert_close(found[3], norm_squared(low), rtol=1e-5, atol=0)
    assert found[4] == 0


def test_orthonormal_columns_even_of_dependent_and_zero_ones() -> None:
    x = torch.randn(3, 80, 6, generator=torch.Generator().manual_seed(0))
    x[1, :, 5] = x[1, :, 4]
    x[2] = 0.0
    found = stacks.orthonormal(x)
    torch.testing.assert_close(found[0].mT @ found[0], torch.eye(6), atol=1e-5, rtol=0)
    assert torch.isfinite(found).all()
    assert not found[2].any()
    torch.testing.assert_close(
        found[1, :, :5].mT @ found[1, :, :5], torch.eye(5), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("rows", "columns"), [(512, 7), (300, 12), (25, 3)])
def test_split_products_are_exact_where_float32_is_not(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns graded by 1e12, and nearly dependent: what float32 would lose is kept."""
    draw = np.random.default_rng(0)
    a = draw.standard_normal((3, rows, columns))
    a[:, :, 1] = a[:, :, 0] + 1e-5 * a[:, :, 1]
    a *= 10.0 ** np.linspace(-6, 6, columns)
    a[2, :, 2] = 0.0
    x = torch.from_numpy(a).float()
    exact = x.double().mT @ x.double()
    monkeypatch.setattr(split, "SMALL", 0)
    sizes = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = (sizes.unsqueeze(-1) * sizes.unsqueeze(-2)).clamp_min(1e-300)

    def lost(found: torch.Tensor) -> float:
        return float(((found - exact).abs() / scale).max())

    for room in (1, 1 << 25):
        monkeypatch.setattr(split, "ROOM", room)
        found = split.gram_of_stack(x)
        assert found.dtype == torch.float64
        assert lost(found) < 6e-8
    assert lost(split.gram_of_stack(torch.from_numpy(a))) < 1e-6, "float64 stays as it is"
    plain = (x.mT @ x).double()
    # the rounding of each entry is that of the factors, so dependent columns stay apart
    apart = torch.tensor([1.0, -1.0], dtype=torch.float64) / sizes[0, :2]
    one, two, true = (float(apart @ g[0, :2, :2] @ apart) for g in (found, plain, exact))
    assert one == pytest.approx(true, rel=0.1)
    assert abs(two - true) > abs(one - true)


def test_slices_add_up_and_have_few_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).clamp(-1.999, 1.999)
    first, second, third = split._slices(x)
    assert torch.equal((first.double() + second.double() + third.double()).float(), x)
    assert torch.equal(first * 2**7, (first * 2**7).round())
    assert float((second * 2**15).abs().max()) <= 128
    assert float(third.abs().max()) <= 2.0**-16


def test_small_problems_of_a_basis_that_is_dependent() -> None:
    draw = np.random.default_rng(4)
    a = draw.standard_normal((30, 20))
    v = draw.standard_normal((20, 5)) * [1e-8, 1.0, 1e3, 1.0, 1.0]
    v[:, 4] = v[:, 3]
    basis, image = (torch.from_numpy(x.T @ x) for x in (v, a @ v))
    found = leading_pairs(basis, image, 4)
    q = np.linalg.qr(v[:, :4])[0]
    exact = np.linalg.svd(a @ q, compute_uv=False) ** 2
    np.testing.assert_allclose(found.values.numpy(), exact, rtol=1e-6)
    s, left, right = coefficients(basis, image, 2)
    one, two = a @ v @ left.numpy(), v @ right.numpy()
    np.testing.assert_allclose(one.T @ one, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(two.T @ two, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(one * s.numpy(), a @ two, atol=1e-6)
    assert not leading_pairs(basis * float("nan"), image, 2).values.any()


def test_numbers_of_several_shapes_come_in_one_copy() -> None:
    one, two = torch.arange(6.0).reshape(2, 3), torch.tensor([7, 8])
    back = fetched(one, two)
    assert [x.dtype for x in back] == [torch.float64] * 2
    assert torch.equal(back[0], one.double())
    assert back[1].tolist() == [7.0, 8.0]
