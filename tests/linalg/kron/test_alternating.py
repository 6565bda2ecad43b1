"""Low-rank Kronecker factors of stacks as accelerators fit them: right for every kind of member, each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.linalg.kron import alternating, lowrank
from adaptkit.linalg.kron.lowrank import KronLowRank, nearest_kron_lowrank


@pytest.fixture(autouse=True)
def stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "one_by_one", lambda _: False)


def product(found: KronLowRank, n: int) -> np.ndarray:
    w1, left, right = (t[n].double().numpy() for t in (found.w1, found.left, found.right))
    return np.kron(w1, left @ right)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def thin(seed: int, a: tuple[int, int], c: tuple[int, int], rank: int) -> np.ndarray:
    return np.kron(drawn(seed, *a), drawn(seed + 1, c[0], rank) @ drawn(seed + 2, rank, c[1]))


@pytest.mark.parametrize("sides", [((4, 3), (18, 24)), ((3, 4), (24, 15))])
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_members_of_every_kind(sides: tuple[tuple[int, int], tuple[int, int]], rank: int) -> None:
    """Noise, zero, of size 1e-15 and 1e15, of a lower rank than is asked for, and flat beyond it."""
    (a, b), (c, d) = sides
    noise = drawn(0, a * c, b * d)
    flat = np.kron(
        drawn(1, a, b), np.linalg.qr(drawn(2, c, d))[0][:, : min(c, d)] @ np.eye(min(c, d), d)
    )
    members = [noise, 0 * noise, 1e-15 * noise, 1e15 * noise, thin(5, *sides, 2), flat]
    stack = torch.from_numpy(np.stack(members)).float()
    found = nearest_kron_lowrank(stack, a, b, rank)
    k = min(rank, c, d)
    assert (found.w1.shape[1:], found.left.shape[1:], found.right.shape[1:]) == (
        (a, b),
        (c, k),
        (k, d),
    )
    errors = [np.linalg.norm(x - product(found, n)) for n, x in enumerate(members)]
    left = [np.linalg.norm(x) ** 2 - float(e) for x, e in zip(members, found.captured, strict=True)]
    for n, x in enumerate(members):
        assert left[n] == pytest.approx(errors[n] ** 2, rel=1e-4, abs=1e-5 * np.linalg.norm(x) ** 2)
        assert found.w1[n].flatten()[found.w1[n].abs().argmax()] > 0
        sizes = [
            float(t[n].double().square().mean().sqrt()) for t in (found.w1, found.left, found.right)
        ]
        assert n == 1 or sizes == pytest.approx([sizes[0]] * 3, rel=1e-4)
    np.testing.assert_allclose(product(found, 2) / 1e-15, product(found, 0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(product(found, 3) / 1e15, product(found, 0), rtol=0, atol=1e-4)
    assert errors[1] == 0.0
    assert found.w1[1].flatten().tolist() == [1.0] + [0.0] * (a * b - 1)
    if rank >= 2:
        assert errors[4] < 1e-5 * np.linalg.norm(members[4])
    cut = max(0, min(c, d) - rank) / min(c, d)
    assert errors[5] == pytest.approx(cut**0.5 * np.linalg.norm(flat), rel=1e-4, abs=1e-3)


def test_many_blocks_and_large_ones_take_a_space_instead_of_a_gram_matrix() -> None:
    for sides in (((18, 17), (12, 14)), ((2, 1), (300, 270))):
        exact = thin(0, *sides, 3)
        noise = drawn(9, *exact.shape) * 0.02 * np.linalg.norm(exact) / exact.size**0.5
        stack = torch.from_numpy(np.stack([exact + noise, exact])).float()
        found = nearest_kron_lowrank(stack, *sides[0], 3)
        assert np.linalg.norm(exact - product(found, 1)) < 1e-5 * np.linalg.norm(exact)
        assert np.linalg.norm(exact + noise - product(found, 0)) < 1.001 * np.linalg.norm(noise)


def test_a_member_goes_on_alone_and_is_what_it_is_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    some = alternating._some_sweeps

    def counted(stack: alternating._Stack, *more: object) -> object:
        looks.append(len(stack.r))
        return some(stack, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(alternating, "_some_sweeps", counted)
    slow = [drawn(seed, 33, 65) for seed in range(3)]
    quick = thin(0, (3, 5), (11, 13), 2)
    stack = torch.from_numpy(np.stack([slow[0], quick, *slow[1:]])).float()
    found = nearest_kron_lowrank(stack, 3, 5, 2)
    assert looks[0] == 4
    assert len(looks) > 1
    assert looks == sorted(looks, reverse=True)
    for n, member in enumerate(stack):
        alone = nearest_kron_lowrank(member.unsqueeze(0), 3, 5, 2)
        np.testing.assert_allclose(product(found, n), product(alone, 0), rtol=0, atol=1e-4)


def test_members_that_are_not_finite_are_refused() -> None:
    """As by the CPU; the caller then names the layer."""
    x = np.stack([drawn(0, 24, 30), drawn(1, 24, 30)])
    x[0, 0, 0] = np.nan
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        nearest_kron_lowrank(torch.from_numpy(x).float(), 4, 3, 2)
