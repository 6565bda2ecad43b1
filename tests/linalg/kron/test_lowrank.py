from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg.kron import lowrank as module
from adaptkit.linalg.kron.blocks import factorization, kron
from adaptkit.linalg.kron.lowrank import nearest_kron_lowrank
from adaptkit.linalg.kron.nearest import nearest_kron
from tests import oracle

RANDOM = np.random.default_rng(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.standard_normal(shape))


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
