from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg import kron as module
from adaptkit.linalg import lowrank
from adaptkit.linalg.kron import factorization, kron, nearest_kron, nearest_kron_lowrank, rearrange
from adaptkit.linalg.lowrank import SvdSpec
from tests import oracle

RANDOM = np.random.default_rng(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.standard_normal(shape))


@pytest.mark.parametrize(
    ("dim", "factor", "expected"),
    [
        (320, 8, (8, 40)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (250, 2, (2, 125)),
        (1024, 4, (4, 256)),
        (4, 8, (2, 2)),
        (8, 8, (1, 8)),
    ],
)
def test_factorization(dim: int, factor: int, expected: tuple[int, int]) -> None:
    """The values of LyCORIS' docstring, and the ones that surprise (tests/interop compares all)."""
    assert factorization(dim, factor) == expected


def test_factorization_is_lycoris() -> None:
    theirs = pytest.importorskip("lycoris.functional.general").factorization
    for dim in range(1, 2001):
        for factor in (-1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32, 64):
            assert factorization(dim, factor) == theirs(dim, factor), (dim, factor)


def test_kron_is_numpys() -> None:
    w1, w2 = tensor(2, 3, 4), tensor(2, 5, 6)
    for n in range(2):
        np.testing.assert_array_equal(
            kron(w1, w2)[n].numpy(), np.kron(w1[n].numpy(), w2[n].numpy())
        )


def test_rearrange_turns_a_kronecker_product_into_an_outer_one() -> None:
    w1, w2 = tensor(3, 4), tensor(5, 6)
    r = rearrange(kron(w1, w2), 3, 4)
    torch.testing.assert_close(r, torch.outer(w1.flatten(), w2.flatten()))


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
    monkeypatch.setattr(module, "GRAM_SIDE", 8)
    error = float((x - kron(*(lambda k: (k.w1, k.w2))(nearest_kron(x, 6, 6)))).norm())
    assert error <= oracle.best_kron(x.numpy(), 6, 6) * 1.001


@pytest.mark.parametrize("a", [18, 30])  # more blocks than entries a block, and fewer
def test_lanczos_captures_what_the_gram_matrix_does(a: int) -> None:
    """White noise is the worst case: a product captures under 1 % of it, behind a flat spectrum."""
    x = tensor(540, 540).float()
    sigma = np.linalg.svd(rearrange(x, a, a).double().numpy(), compute_uv=False)[0]
    assert min(a * a, (540 // a) ** 2) > module.GRAM_SIDE
    captured = float(nearest_kron(x, a, a).captured)
    assert sigma**2 * 0.995 <= captured <= sigma**2 * (1 + 1e-6)
    r = rearrange(x, a, a)[None]
    stacked = lowrank._stacked(r, SvdSpec(module.STACK_RANK, method="lanczos")).u[
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
    monkeypatch.setattr(module, "one_by_one", lambda _: False)
    two = nearest_kron(x, 4, 4)
    for name in ("captured", "w1", "w2"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-7)


class TestLowRank:
    def test_recovers_a_low_rank_second_factor(self) -> None:
        w1, left, right = tensor(4, 4), tensor(16, 3), tensor(3, 20)
        x = kron(w1, left @ right)
        found = nearest_kron_lowrank(x, 4, 4, 3)
        torch.testing.assert_close(
            kron(found.w1, found.left @ found.right), x, rtol=1e-6, atol=1e-6
        )

    def test_never_worse_than_truncating_and_never_better_than_full(self) -> None:
        x = tensor(48, 60)
        full = nearest_kron(x, 4, 4)
        u, s, vh = np.linalg.svd(full.w2.numpy())
        cut = torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3])
        truncated = float((x - kron(full.w1, cut)).norm())
        found = nearest_kron_lowrank(x, 4, 4, 3)
        error = float((x - kron(found.w1, found.left @ found.right)).norm())
        assert error <= truncated + 1e-9
        assert error >= oracle.best_kron(x.numpy(), 4, 4) - 1e-9
        assert float(found.captured) == pytest.approx(float(x.square().sum()) - error**2, rel=1e-6)

    def test_more_sweeps_never_capture_less(self) -> None:
        x = tensor(48, 60)
        captured = [float(nearest_kron_lowrank(x, 4, 4, 2, sweeps).captured) for sweeps in range(6)]
        assert captured == sorted(captured)
        assert captured[-1] > captured[0]

    def test_full_rank_equals_the_nearest_product(self) -> None:
        x = tensor(24, 30)
        low, full = nearest_kron_lowrank(x, 4, 3, 99), nearest_kron(x, 4, 3)
        assert float(low.captured) == pytest.approx(float(full.captured), rel=1e-6)

    def test_factors_have_equal_root_mean_squares(self) -> None:
        """Reference §3.5; the sign goes to the largest entry of w1."""
        for _ in range(4):
            found = nearest_kron_lowrank(tensor(48, 60), 4, 4, 3)
            sizes = [float(f.square().mean().sqrt()) for f in (found.w1, found.left, found.right)]
            assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-6)
            assert found.w1.flatten()[found.w1.abs().argmax()] > 0


# Layers that `extract --algo lokr --rank 2` used to leave up to 1 % above the least error: a
# factored second factor, in a plain, a convolution and an odd shape
HARD = [("l2", 2), ("c1", 16), ("p", 7), ("l2", 3), ("c1", 4), ("l1", 4)]


def layers() -> dict[str, tuple[np.ndarray, int]]:
    """Each layer (m, n·K) and its window K."""
    draw = np.random.default_rng(1)
    shapes = {"l1": (96, 64), "l2": (60, 84), "c1": (32, 16, 3, 3), "p": (33, 65)}
    made = {}
    for name, shape in shapes.items():
        w = draw.standard_normal(shape)
        if name == "l1":
            w = np.kron(draw.standard_normal((8, 8)), draw.standard_normal((12, 8))) + 0.7 * w
        if name == "l2":
            w1 = draw.standard_normal((6, 7))
            thin = draw.standard_normal((10, 3)) @ draw.standard_normal((3, 12))
            w = np.kron(w1, thin) + 0.5 * w
        made[name] = w.reshape(shape[0], -1), int(np.prod(shape[2:]))
    return made


@pytest.mark.parametrize(("name", "factor"), HARD)
def test_a_second_factor_of_low_rank_is_that_of_the_best_of_twenty_restarts(
    name: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, window = layers()[name]
    (a, c), (b, d) = factorization(x.shape[0], factor), factorization(x.shape[1] // window, factor)
    found = nearest_kron_lowrank(torch.from_numpy(x).float(), a, b, 2)
    w2 = found.left.double() @ found.right.double()
    error = np.linalg.norm(x - np.kron(found.w1.double().numpy(), w2.numpy()))
    least = oracle.best_kron_of_rank(x, (a, b), (c, d * window), 2, restarts=20)
    assert error <= 1.001 * least
    stacked = torch.from_numpy(np.stack([x, x])).float()
    again = nearest_kron_lowrank(stacked, a, b, 2)
    assert torch.equal(again.w1[1], found.w1), "each of a stack as by itself"
    monkeypatch.setattr(module, "one_by_one", lambda _: False)
    noise = np.random.default_rng(3).standard_normal(x.shape)
    whole = nearest_kron_lowrank(torch.from_numpy(np.stack([noise, x])).float(), a, b, 2)
    w1, w2 = (t[1].double().numpy() for t in (whole.w1, whole.left.double() @ whole.right.double()))
    error = np.linalg.norm(x - np.kron(w1, w2))
    assert error <= 1.001 * least, "an accelerator sweeps all starts at once"
    assert float(whole.captured[1]) == pytest.approx(np.linalg.norm(x) ** 2 - error**2, rel=1e-5)


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
