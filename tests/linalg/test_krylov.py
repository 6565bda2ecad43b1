"""Krylov spaces by their own promises: orthonormal, inside the matrix's range, never above its σ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptkit.linalg import krylov
from adaptkit.linalg.krylov import (
    Krylov,
    eigenvalues,
    eigh,
    explored,
    gram_columns,
    power_of_two,
)
from adaptkit.linalg.lowrank import SvdSpec, truncated_svd
from adaptkit.linalg.precision import norm_squared


def matrix(m: int, n: int, falloff: float = 1.0, seed: int = 0) -> np.ndarray:
    """Singular values that fall off as a power of their number."""
    draw = np.random.default_rng(seed)
    size = min(m, n)
    u, v = (np.linalg.qr(draw.standard_normal((side, size)))[0] for side in (m, n))
    values: np.ndarray = (u * np.arange(1, size + 1) ** -falloff) @ v.T
    return values


def grown(a: np.ndarray, rank: int, blocks: int) -> Krylov:
    tensor = torch.from_numpy(a)
    space = Krylov(tensor, rank, 0, norm_squared(tensor))
    for _ in range(blocks):
        space.grow()
    return space


@pytest.mark.parametrize(("m", "n"), [(120, 90), (90, 120)])
def test_a_space_is_orthonormal_and_its_gram_matrix_is_the_matrixs(m: int, n: int) -> None:
    a = matrix(m, n)
    space = grown(a, 6, 4)
    v = space.v.numpy()
    assert v.shape == (n, 32), "four blocks of eight"
    np.testing.assert_allclose(v.T @ v, np.eye(32), atol=1e-12)
    np.testing.assert_allclose(space.w.numpy(), a @ v, atol=1e-13)
    np.testing.assert_allclose(space.gram[:32, :32].numpy(), v.T @ a.T @ a @ v, atol=1e-13)
    scale = float(space.scale)
    np.testing.assert_allclose(space.back.numpy(), scale * a.T @ (a @ v), atol=1e-12 * scale)
    assert math.log2(scale) == round(math.log2(scale)), "a power of two is exact"


def test_ritz_values_rise_to_the_true_ones_and_never_above() -> None:
    a = matrix(150, 100)
    exact = np.linalg.svd(a, compute_uv=False)[:6] ** 2
    before = np.zeros(6)
    for blocks in (1, 2, 4, 8):
        space = grown(a, 6, blocks)
        found = space.values().numpy()
        assert (found <= exact * (1 + 1e-12)).all()
        assert (found >= before - 1e-15).all()
        again, vectors = space.ritz()
        np.testing.assert_allclose(again.numpy(), found, rtol=1e-12)
        assert vectors.shape == (space.size, 6)
        before = found
    np.testing.assert_allclose(before, exact, rtol=1e-6)


def test_a_space_stops_where_the_matrix_has_no_more() -> None:
    """Rank 10, blocks of eight: the second block has two directions left, the third none."""
    draw = np.random.default_rng(1)
    a = draw.standard_normal((60, 10)) @ draw.standard_normal((10, 50))
    space = grown(a, 4, 1)
    assert space.size == 8
    space.grow()
    assert space.size == 10
    assert not space.grow()
    np.testing.assert_allclose(
        space.values().numpy(), np.linalg.svd(a, compute_uv=False)[:4] ** 2, rtol=1e-10
    )
    assert not space.reopened(3), "it holds all there is"


def test_a_space_ends_at_its_limit() -> None:
    a = matrix(200, 90, falloff=0.1)
    space = grown(a, 2, 0)
    assert space.limit == 6 * 2 + 64
    answers = [space.grow() for _ in range(10)]
    assert answers == [True] * 9 + [False]
    assert space.size == space.limit
    assert not space.reopened(0)


def test_an_invariant_space_without_all_of_the_matrix_is_opened_again() -> None:
    """The identity: every start is invariant at once, and holds one copy of σ a column."""
    space = grown(np.eye(40), 10, 1)
    assert space.size == 16
    assert not space.grow()
    assert space.reopened(5)
    assert space.grow()
    assert space.size == 32


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_exploring_goes_on_until_little_is_to_be_gained(tol: float) -> None:
    a = matrix(300, 250, falloff=0.5)
    exact = np.linalg.svd(a, compute_uv=False) ** 2
    space = explored(torch.from_numpy(a), 12, tol, 0)
    missed = (exact[:12].sum() - float(space.values().sum())) / exact[12:].sum()
    assert 0 <= missed / 2 < tol
    assert space.size < 250


def test_a_smaller_tolerance_takes_a_larger_space() -> None:
    a = torch.from_numpy(matrix(300, 250, falloff=0.5))
    sizes = [explored(a, 12, tol, 0).size for tol in (1e-1, 1e-3, 1e-6)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("exponent", [-30, -3, 0, 7, 40])
def test_the_scale_is_about_one_over_the_norm(exponent: int) -> None:
    found = float(power_of_two(torch.tensor(1.9 * 4.0**exponent, dtype=torch.float64)))
    assert found == 2.0**-exponent
    assert float(power_of_two(torch.tensor(0.0))) <= 2.0**120
    assert float(power_of_two(torch.tensor(1e300, dtype=torch.float64))) == 2.0**-120


def test_gram_matrices_are_summed_in_float64_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "BLOCK", 100)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 37, 9)) * 1e3).float()
    found = gram_columns(x)
    assert found.dtype == torch.float64
    exact = np.einsum("bmi,bmj->bij", x.double().numpy(), x.double().numpy())
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-13)


def test_eigenvalues_descend_and_are_never_negative() -> None:
    draw = np.random.default_rng(0).standard_normal((3, 8, 5))
    gram = torch.from_numpy(draw @ draw.transpose(0, 2, 1))  # rank 5 of 8
    values, vectors = eigh(gram)
    exact = np.linalg.eigvalsh(gram.numpy())[:, ::-1].clip(0)
    np.testing.assert_allclose(values.numpy(), exact, atol=1e-12)
    np.testing.assert_allclose(eigenvalues(gram).numpy(), exact, atol=1e-12)
    assert float(values.min()) >= 0
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    np.testing.assert_allclose(rebuilt.numpy(), gram.numpy(), atol=1e-12)


def test_eigenvalues_of_what_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 8)))
    gram = draw @ draw.mT

    def fail(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    exact = np.linalg.eigvalsh(gram.numpy())[::-1]
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    np.testing.assert_allclose(eigenvalues(gram).numpy(), exact, atol=1e-12)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    np.testing.assert_allclose(eigenvalues(gram).numpy(), exact, atol=1e-12)


def test_wider_blocks_go_with_higher_ranks() -> None:
    assert [krylov.block_width(1000, rank) for rank in (1, 8, 9, 64, 65)] == [8, 8, 16, 16, 32]
    assert krylov.block_width(5, 100) == 5


@pytest.mark.parametrize("rho", [0.45, 0.6, 0.85])
@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_a_space_is_settled_where_half_as_much_again_as_is_left_would_not_matter(
    rho: float, tol: float
) -> None:
    """Errors that fall to E geometrically: what is left is known, and so is what it is of √E."""
    left = 4 / 3 * tol  # of E; the error itself gains half of that, with a margin of a half: tol
    for share, settled in ((0.98, True), (1.02, False)):
        errors = [1 + share * left * rho**-k for k in (2, 1, 0)]
        # of the error now, which is larger than E by what is left
        errors = [error / errors[-1] for error in errors]
        assert krylov._settled(errors, 1e3, tol * (1 - share * left)) == settled


def test_a_space_is_settled_where_nothing_is_left_and_never_on_two_looks() -> None:
    assert krylov._settled([1e-13], 1.0, 1e-9)
    assert not krylov._settled([1e-11], 1.0, 1.0)
    assert not krylov._settled([0.5, 0.5], 1.0, 1.0)
    assert krylov._settled([0.5, 0.5, 0.5], 1.0, 1e-9), "nothing was gained"
    # an error that is small beside ‖A‖ may change by a large share of itself
    assert krylov._settled([3e-9, 2e-9, 1.5e-9], 1e4, 1e-6)
    assert not krylov._settled([3e-9, 2e-9, 1.5e-9], 1e-6, 1e-6)


def test_every_copy_of_a_repeated_value_is_found_a_block_at_a_time() -> None:
    """A start of sixteen columns holds sixteen copies: sixty take four, and each is worth it."""
    draw = np.random.default_rng(3)
    u, v = (np.linalg.qr(draw.standard_normal((200, 200)))[0] for _ in range(2))
    sigma = np.concatenate([np.ones(60), 0.05 * np.arange(1, 141) ** -0.5])
    space = explored(torch.from_numpy((u * sigma) @ v.T), 60, 1e-3, 0)
    assert space.width == 16
    np.testing.assert_allclose(space.values().numpy(), np.ones(60), rtol=1e-4)


def spectra(n: int, k: int) -> dict[str, np.ndarray]:
    """Spectra that mislead: clusters wider than a block, steps at the rank sought, plateaus."""
    i = np.arange(1.0, n + 1)
    found = {f"power {p}": i**-p for p in (0.1, 0.25, 0.5, 1.0, 2.0)}
    found |= {f"power 1, noise {f}": np.hypot(1 / i, f) for f in (0.02, 0.05)}
    found |= {f"exponential {t}": np.exp(-i / t) for t in (5, 20, 60)}
    for near in (-3, 0, 1, 5):
        found |= {f"step {near} {low}": np.where(i <= k + near, 1.0, low) for low in (0.9, 0.1)}
    for spread in (0.0, 1e-4, 1e-2, 0.1):
        rise = 1 - spread * i / (2 * k)
        found[f"top {spread}"] = np.where(i <= 3 * k // 2, rise, 0.1 * i**-0.3)
        rest = np.where(i <= 2 * k, 0.5 * rise, 0.05 * i**-0.2)
        found[f"middle {spread}"] = np.where(i <= k // 2, 1.0, rest)
    found["flat"], found["linear"] = np.ones(n), 1 - 0.9 * i / n
    found["hidden"] = np.where(i <= k - 4, 1.0, np.where(i <= k + 4, 0.1, 0.01))
    return found


@pytest.mark.parametrize(("m", "n", "rank", "most"), [(300, 256, 16, 1800), (420, 320, 40, 3450)])
def test_the_error_is_within_a_thousandth_of_the_least_on_spectra_that_mislead(
    m: int, n: int, rank: int, most: int
) -> None:
    """The promise of `truncated_svd`, and the columns that it takes: `most` over all of them."""
    draw = np.random.default_rng(rank)
    u, v = (np.linalg.qr(draw.standard_normal((side, n)))[0] for side in (m, n))
    columns = 0
    for name, values in spectra(n, rank).items():
        sigma = np.sort(values)[::-1]
        a = (u * sigma) @ v.T
        tensor = torch.from_numpy(a).float()
        found = truncated_svd(tensor, SvdSpec(rank, method="lanczos"))
        low = (found.u.double() * found.s.double()) @ found.vh.double()
        least = np.sqrt((sigma[rank:] ** 2).sum())
        assert np.linalg.norm(a - low.numpy()) <= 1.001 * least, name
        columns += explored(tensor, rank, 1e-3, 0).size
    assert columns <= most


def test_eighty_columns_suffice_for_rank_32_of_a_real_looking_difference() -> None:
    """96 to 112 were taken where only the gains were asked."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.standard_normal((side, 512)))[0] for side in (640, 512))
    a = (u * np.hypot(1 / np.arange(1.0, 513), 0.02)) @ v.T
    assert explored(torch.from_numpy(a).float(), 32, 1e-3, 0).size == 80


@pytest.mark.parametrize("blocks", [3, 5])
def test_what_a_space_lacks_is_told_by_its_residuals(blocks: int) -> None:
    a = matrix(300, 250, falloff=0.5)
    space = grown(a, 12, blocks)
    exact = (np.linalg.svd(a, compute_uv=False)[:12] ** 2).sum()
    lacking = exact - float(space.values().sum())
    assert 0.3 * lacking < space.lacking() < 5 * lacking


@pytest.mark.parametrize(("rank", "width"), [(8, 8), (16, 16), (32, 24), (80, 32)])
def test_blocks_of_a_matrix_beyond_the_cache_are_wider(
    rank: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is multiplied some rows at a time, to the same space."""
    a = torch.from_numpy(matrix(700, 300, 0.7, 3)).float()
    small = krylov.Krylov(a, rank, 0, a.double().square().sum())
    monkeypatch.setattr(krylov, "LARGE", a.numel() - 1)
    large = krylov.Krylov(a, rank, 0, a.double().square().sum())
    assert small.width == krylov.block_width(300, rank)
    assert large.width == width
    while large.size < 2 * rank:
        large.grow()
    v, w = large.v.double(), large.w.double()
    assert float((v.mT @ v - torch.eye(large.size, dtype=v.dtype)).abs().max()) < 1e-5
    assert float((a.double() @ v - w).norm() / w.norm()) < 1e-6
    back = large.scale.double() * (a.double().mT @ w)
    assert float((large.back.double() - back).norm() / back.norm()) < 1e-6
