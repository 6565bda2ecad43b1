"""Low-rank approximation against NumPy's float64 SVD, on the families of differences the reference measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg import lowrank
from adaptkit.linalg.lowrank import (
    SvdSpec,
    energies,
    product_distance,
    truncated_svd,
    truncation_errors,
)

Array = np.ndarray


def family(name: str, m: int, n: int, seed: int = 0) -> Array:
    """`plA`: power law σᵢ ~ i^-A carrying 70 % of the energy, the rest white; `steep`, `slow`: pure; `lora`: rank 24, rounded."""
    random = np.random.default_rng(seed)
    small = min(m, n)
    u, _ = np.linalg.qr(random.standard_normal((m, small)))
    v, _ = np.linalg.qr(random.standard_normal((n, small)))
    noise = random.standard_normal((m, n))
    i = np.arange(1, small + 1)
    if name == "lora":
        base = random.standard_normal((m, n)).astype(np.float16)
        delta = random.standard_normal((m, 24)) @ random.standard_normal((24, n)) * 0.03 / 24**0.5
        return ((base + delta).astype(np.float16).astype(np.float64) - base) / 1.0
    if name == "qkv":
        scales = np.repeat([1.0, 0.3, 3.0], [m // 3, m // 3, m - 2 * (m // 3)])[:, None]
        return scales * family("pl1", m, n, seed)
    power = {"steep": 2.0, "slow": 0.25}.get(name) or float(name.removeprefix("pl"))
    a = (u * i**-power) @ v.T
    a /= np.linalg.norm(a)
    return (
        a if name in ("steep", "slow") else 0.7**0.5 * a + 0.3**0.5 * noise / np.linalg.norm(noise)
    )


def reconstructed(found: lowrank.LowRank) -> Array:
    return ((found.u * found.s.unsqueeze(-2)) @ found.vh).double().numpy()


@pytest.mark.parametrize("name", ["pl0.5", "pl1", "pl1.5", "steep", "slow", "lora", "qkv"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(320, 640, 8), (640, 320, 32), (448, 448, 16), (300, 900, 24)]
)
def test_within_a_thousandth_of_the_optimum(name: str, m: int, n: int, k: int) -> None:
    a = family(name, m, n)
    best = float(np.sqrt((np.linalg.svd(a, compute_uv=False)[k:] ** 2).sum()))
    for method in ("lanczos", "gram", "auto"):
        found = truncated_svd(torch.from_numpy(a).float(), SvdSpec(k, method=method))
        error = np.linalg.norm(a - reconstructed(found))
        assert error <= best * 1.001 + 3e-7 * np.linalg.norm(a), method
        # the reported residual is the real one
        assert float(found.residual) ** 0.5 == pytest.approx(
            error, rel=1e-4, abs=2e-7 * np.linalg.norm(a)
        )


@pytest.mark.share(3)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("tail", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize(("copies", "k"), [(20, 20), (32, 32), (32, 48), (48, 32), (64, 64)])
def test_a_singular_value_more_often_than_a_block_has_columns(
    copies: int, k: int, tail: float, spread: float
) -> None:
    """One start finds as many copies of a σ as it has columns: a merged LoRA with orthonormal factors has `copies` of them."""
    random = np.random.default_rng(3)
    m, n = 1280, 640
    u, v = (np.linalg.qr(random.standard_normal((rows, n)))[0] for rows in (m, n))
    sigma = np.full(n, tail)
    sigma[:copies] = 1 - spread * np.linspace(0, 1, copies)
    a = (u * sigma) @ v.T
    best, whole = np.sqrt((sigma[k:] ** 2).sum()), np.linalg.norm(a)
    found = truncated_svd(torch.from_numpy(a).float(), SvdSpec(k, method="lanczos"))
    assert np.linalg.norm(a - reconstructed(found)) <= best * 1.001 + 3e-7 * whole
    kept = energies(torch.from_numpy(a).float(), k).sum()
    assert np.sqrt(max(0.0, whole**2 - float(kept))) <= best * 1.001 + 1e-3 * whole
    found = lowrank._stacked(torch.from_numpy(a).float()[None], SvdSpec(k, method="lanczos"))
    assert np.linalg.norm(a - reconstructed(found)[0]) <= best * 1.001 + 3e-6 * whole


@pytest.mark.parametrize("method", ["gram", "lanczos", "exact"])
def test_exactly_low_rank_input_is_exact(method: str) -> None:
    random = np.random.default_rng(1)
    a = random.standard_normal((400, 12)) @ random.standard_normal((12, 500))
    found = truncated_svd(torch.from_numpy(a).float(), SvdSpec(20, method=method))
    assert np.linalg.norm(a - reconstructed(found)) <= 1e-6 * np.linalg.norm(a)
    assert (found.s[12:] < 1e-5 * found.s[0]).all()
    sigma = np.linalg.svd(a, compute_uv=False)[:12]
    np.testing.assert_allclose(found.s[:12].numpy(), sigma, rtol=1e-5)


def test_exact_is_the_svd_of_lapack_in_float64_also_far_below_the_largest_singular_value() -> None:
    """AᵀA alone would lose all below 1e-8 σ₁: found in float64, so that float32 rounds only what is returned."""
    random, (m, n, k) = np.random.default_rng(7), (260, 170, 40)
    u, v = (np.linalg.qr(random.standard_normal((side, n)))[0] for side in (m, n))
    i = np.arange(n)
    spectra = {
        "noise": np.linalg.svd(random.standard_normal((m, n)), compute_uv=False),
        "graded": 10.0 ** (-i / 4),
        "steep": 2.0 ** -i.clip(0, 45),
        "steps": np.where(i < 12, 1.0, np.where(i < 36, 1e-7, 1e-13)),
        "of lower rank": np.where(i < 30, 1.0 / (i + 1), 0.0),
    }
    for name, sigma in spectra.items():
        a = (u * sigma) @ v.T
        for matrix in (a, a.T):
            found = truncated_svd(torch.from_numpy(matrix.copy()), SvdSpec(k, method="exact"))
            s = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(
                found.s.numpy(), s[:k], rtol=1e-12, atol=4e-15 * s[0], err_msg=name
            )
            error, best = np.linalg.norm(matrix - reconstructed(found)), np.linalg.norm(s[k:])
            assert error <= best * (1 + 1e-9) + 1e-13 * s[0], name
            for q in (found.u, found.vh.mT):
                torch.testing.assert_close(q.mT @ q, torch.eye(k).double(), atol=1e-12, rtol=0)
        narrow = torch.from_numpy(a).float()
        found = truncated_svd(narrow, SvdSpec(k, method="exact"))
        s = np.linalg.svd(narrow.double().numpy(), compute_uv=False)[:k]
        np.testing.assert_allclose(found.s.numpy(), s, rtol=1e-7, atol=1e-13 * s[0], err_msg=name)


@pytest.mark.parametrize("method", ["gram", "lanczos", "exact", "auto"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(5, 3, 9), (1, 40, 4), (40, 1, 4), (7, 200, 3), (200, 200, 200), (150, 4, 2)]
)
def test_odd_shapes(method: str, m: int, n: int, k: int) -> None:
    a = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = truncated_svd(a, SvdSpec(k, method=method))
    rank = min(k, m, n)
    assert found.u.shape == (m, rank)
    assert found.vh.shape == (rank, n)
    best = float(np.sqrt((np.linalg.svd(a.numpy(), compute_uv=False)[rank:] ** 2).sum()))
    assert np.linalg.norm(a.numpy() - reconstructed(found)) <= best * 1.001 + 1e-6


@pytest.mark.parametrize("method", ["gram", "lanczos", "exact"])
def test_zero_gives_zeros(method: str) -> None:
    found = truncated_svd(torch.zeros(200, 300), SvdSpec(5, method=method))
    assert not found.s.any()
    assert torch.isfinite(found.u).all()
    assert torch.isfinite(found.vh).all()
    assert float(found.residual) == 0.0


def test_factors_are_orthonormal_signed_and_descending() -> None:
    found = truncated_svd(
        torch.from_numpy(family("pl1", 300, 400)).float(), SvdSpec(16, method="lanczos")
    )
    eye = torch.eye(16)
    torch.testing.assert_close(found.u.mT @ found.u, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.vh @ found.vh.mT, eye, atol=1e-5, rtol=0)
    assert (found.s.diff() <= 0).all()
    top = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
    assert (top > 0).all()
    left, right = found.balanced()
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_equal_bits_alone_and_in_any_batch() -> None:
    stack = torch.stack(
        [torch.from_numpy(family("pl1", 200, 300, seed)).float() for seed in range(3)]
    )
    alone = truncated_svd(stack[1], SvdSpec(8, method="lanczos"))
    for batch in (stack, stack.flip(0), stack.reshape(3, 1, 200, 300)):
        found = truncated_svd(batch, SvdSpec(8, method="lanczos"))
        member = found.u.reshape(3, 200, 8)[1]
        assert torch.equal(member, alone.u)
    again = truncated_svd(stack[1].clone(), SvdSpec(8, method="lanczos"))
    assert torch.equal(again.vh, alone.vh)
    assert truncated_svd(torch.zeros(0, 4, 5), SvdSpec(2)).u.shape == (0, 4, 2)


@pytest.mark.parametrize("k", [6, 24, 90])
@pytest.mark.parametrize(("m", "n"), [(300, 420), (420, 300)])
def test_the_stacked_form_of_accelerators_is_as_good(m: int, n: int, k: int) -> None:
    """What a GPU runs, run here: one stack of easy, hard, zero and low-rank members."""
    names = ("pl0.5", "pl1", "steep", "lora", "qkv")
    members = [family(name, m, n) for name in names] + [
        np.zeros((m, n)),
        np.outer(np.arange(m), np.ones(n)),
    ]
    stack = torch.from_numpy(np.stack(members)).float()
    bests = [float(np.sqrt((np.linalg.svd(a, compute_uv=False)[k:] ** 2).sum())) for a in members]
    for method in ("lanczos", "gram", "auto"):
        found = lowrank._stacked(stack.reshape(7, 1, m, n), SvdSpec(k, method=method))
        assert found.u.shape == (7, 1, m, k)
        assert torch.isfinite(found.u).all()
        assert torch.isfinite(found.vh).all()
        for i, (a, best) in enumerate(zip(members, bests, strict=True)):
            error = np.linalg.norm(a - reconstructed(found)[i, 0])
            assert error <= best * 1.001 + 3e-6 * np.linalg.norm(a), (method, i)
            assert float(found.residual[i, 0]) ** 0.5 == pytest.approx(
                error, rel=1e-3, abs=3e-6 * np.linalg.norm(a)
            )
        assert not found.s[5].any()


def test_half_precision_is_computed_in_float32() -> None:
    a = torch.from_numpy(family("pl1", 200, 300)).half()
    found = truncated_svd(a, SvdSpec(8))
    assert found.u.dtype == torch.float32
    assert found.residual.dtype == torch.float64


@pytest.mark.parametrize("name", ["pl0.5", "pl1", "lora", "steep"])
def test_energies_are_what_a_rank_keeps(name: str) -> None:
    a = family(name, 400, 500)
    sigma = np.linalg.svd(a, compute_uv=False)
    for k in (4, 24):
        found = energies(torch.from_numpy(a).float(), k)
        kept, whole = float(found.sum()), (sigma**2).sum()
        assert kept <= (sigma[:k] ** 2).sum() * (1 + 1e-6)
        assert whole - kept <= ((sigma[k:] ** 2).sum()) * 1.002 + 1e-6 * whole
    assert energies(torch.zeros(2, 30, 40), 3).shape == (2, 3)
    assert energies(torch.zeros(0, 30, 40), 50).shape == (0, 30)


def test_eigh_that_does_not_converge_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(60, 40, dtype=torch.float64)
    expected = {
        method: truncated_svd(a, SvdSpec(5, method=method)).s for method in ("auto", "exact")
    }

    def fail(gram: torch.Tensor, **_: object) -> None:
        gram.zero_()  # LAPACK leaves it in pieces
        raise torch.linalg.LinAlgError("did not converge")

    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram, **out: fail(gram) if out else eigh(gram))
    for method, s in expected.items():
        torch.testing.assert_close(truncated_svd(a, SvdSpec(5, method=method)).s, s)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram, **_: fail(gram.clone()))
    for method, s in expected.items():
        torch.testing.assert_close(truncated_svd(a, SvdSpec(5, method=method)).s, s)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown SVD method"):
        truncated_svd(torch.zeros(3, 3), SvdSpec(1, method="magic"))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("method", ["lanczos", "gram", "exact"])
def test_scale_does_not_matter(method: str, scale: float) -> None:
    a = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    one = truncated_svd(a, SvdSpec(4, method=method))
    two = truncated_svd(a * scale, SvdSpec(4, method=method))
    torch.testing.assert_close(two.s / scale, one.s, rtol=1e-5, atol=0)
    assert float(two.residual) == pytest.approx(float(one.residual) * scale**2, rel=1e-6, abs=0)


@pytest.mark.gpu
def test_cuda_agrees() -> None:
    a = torch.from_numpy(family("pl1", 400, 500)).float()
    one, two = truncated_svd(a, SvdSpec(16)), truncated_svd(a.cuda(), SvdSpec(16))
    torch.testing.assert_close(one.residual.sqrt(), two.residual.sqrt().cpu(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "rank"), [(40, 30, 12), (7, 50, 7), (300, 20, 1)])
def test_errors_of_all_truncations_whatever_the_factors(m: int, n: int, rank: int) -> None:
    """Rounded factors, factors that are no singular vectors, and a residual that is nearly zero."""
    draw = torch.Generator().manual_seed(m)
    left, right = torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw) * 0.1
    for a in (
        torch.randn(m, n, generator=draw),
        left @ right + 1e-4 * torch.randn(m, n, generator=draw),
    ):
        stored = left.half().double(), right.half().double()
        found = truncation_errors(a, left.half().float(), right.half().float())
        assert found.shape == (rank + 1,)
        for k in range(rank + 1):
            true = float((a.double() - stored[0][:, :k] @ stored[1][:k]).square().sum())
            assert float(found[k]) == pytest.approx(true, rel=2e-5)


def test_loose_energies_come_from_eigenvalues_of_a_float32_gram_matrix_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The LoRA of the same size as a LoKr of factor 2: 29 of 32 s went into unused eigenvectors."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.standard_normal((side, 200)))[0] for side in (300, 200))
    sigma = np.hypot(1 / np.arange(1.0, 201), 0.02)
    a = torch.from_numpy((u * sigma) @ v.T).float()

    def never(*_: object) -> None:
        raise AssertionError("eigenvectors, or a Gram matrix in float64")

    monkeypatch.setattr(lowrank, "leading_vectors", never)
    exact = energies(a, 60)
    monkeypatch.setattr(lowrank, "gram_columns", never)
    rough = energies(a, 60, SvdSpec(60, tol=5e-3))
    assert rough.dtype == exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), sigma[:60] ** 2, rtol=2e-6)
    np.testing.assert_allclose(rough.numpy(), sigma[:60] ** 2, atol=1e-6 * (sigma**2).sum())


@pytest.mark.parametrize(("m", "n", "r"), [(300, 200, 8), (40, 700, 3)])
def test_a_distance_from_a_product_takes_one_pass_unless_it_cancels(m: int, n: int, r: int) -> None:
    random = np.random.default_rng(5)
    a = random.standard_normal((m, n)).astype(np.float32)
    left, right = random.standard_normal((m, r)), random.standard_normal((r, n))
    exact = a.astype(np.float64) + 0.01 * left @ right
    far = np.square(a.astype(np.float64) - left @ right).sum()
    pair = torch.from_numpy(left), torch.from_numpy(right)
    found = product_distance(
        torch.from_numpy(a), *pair, float(np.square(a, dtype=np.float64).sum())
    )
    assert found == pytest.approx(far, rel=1e-6)
    near = torch.from_numpy((left @ right + 0.01 * exact).astype(np.float32))
    assert product_distance(near, *pair, float(near.double().square().sum())) is None
