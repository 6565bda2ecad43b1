from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.algorithms._kron_shapes import PIECEWISE
from adaptkit.linalg.kron import blocks
from adaptkit.linalg.kron.blocks import (
    block_gram,
    combined_blocks,
    factorization,
    kron,
    kron_distance,
    rearrange,
)

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


@pytest.mark.parametrize("shape", [(48, 60), (6, 30000), (20, 4), (5, 4096 * 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_sums_over_blocks_are_those_of_the_rearranged_matrix(
    shape: tuple[int, int], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made in pieces: of many rows, of one row each, and of more entries than a run."""
    x = tensor(*shape[::-1]).mT if turned else tensor(*shape)
    a, b = next(n for n in (3, 2, 5) if shape[0] % n == 0), 2
    r = rearrange(x, a, b).numpy()
    w1 = tensor(a, b)
    second = (w1.flatten().numpy() @ r).reshape(shape[0] // a, shape[1] // b)
    for size in (1 << 18, 100, 1):
        monkeypatch.setattr(blocks, "SCRATCH", size)
        assert block_gram(x, a, b).numpy() == pytest.approx(r @ r.T, rel=1e-12)
        assert combined_blocks(x, w1).numpy() == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_the_distance_to_a_product_is_that_of_the_difference(size: float) -> None:
    x, w1, w2 = tensor(40, 60) * size, tensor(4, 3), tensor(10, 20) * size * 0.1
    x, w1, w2 = x.float(), w1.float(), w2.float()
    exact = x.double().numpy() - np.kron(w1.double().numpy(), w2.double().numpy())
    total = float(x.double().square().sum())
    assert kron_distance(x, w1, w2, total) == pytest.approx((exact**2).sum(), rel=1e-5)
    near = kron(w1, w2) + 0.001 * x
    assert kron_distance(near, w1, w2, float(near.double().square().sum())) is None


def test_plans_know_which_factors_are_looked_at_in_pieces() -> None:
    assert blocks.GRAM_SIDE == PIECEWISE**2
