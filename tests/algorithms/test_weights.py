"""What the algorithms share: scales, blocks of parts that are fused, and the contract's refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptkit.algorithms._factor import Dense, Product, Tucker, spread
from adaptkit.algorithms._parts import grouped, same, stacked, unique
from adaptkit.algorithms._stored import flat, scaling
from adaptkit.algorithms.contract import FitSpec, Stated, Weights
from adaptkit.errors import NonFinite, NotRepresentable
from adaptkit.keymap import algorithms


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_a_scale_is_alpha_by_rank_or_its_root_or_one() -> None:
    assert scaling(None, 7) == 1.0
    assert scaling(Stated(8.0), 16) == 0.5
    assert scaling(Stated(8.0, rank_scaled=True), 16) == 2.0
    assert scaling(Stated(-3.0), 2) == -1.5
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFinite, match=f"alpha is {value}"):
            scaling(Stated(value), 4)


def test_equal_tensors_are_one_group_bit_for_bit() -> None:
    one = draw(3, 4)
    assert grouped([one, one.clone(), one + 1, one, one.float(), one[:2]]) == [0, 0, 1, 0, 2, 3]
    assert same(None, None)
    assert not same(one, None)
    assert not same(None, one)
    assert not same(one, one.float())
    assert not same(torch.zeros(2), torch.zeros(1, 2))
    assert [t is one for t in unique([one, one + 1, one], [0, 1, 0])] == [True, False]


def test_parts_of_different_groups_get_columns_of_their_own() -> None:
    a, b, c = draw(2, 3), draw(4, 1, seed=1), draw(1, 3, seed=2)
    found = stacked([a, b, c], [0, 1, 0]).numpy()
    exact = np.zeros((7, 4))
    exact[:2, :3], exact[2:6, 3:], exact[6:, :3] = a, b, c
    assert np.array_equal(found, exact)
    assert torch.equal(stacked([a, c], [0, 0]), torch.cat([a, c]))
    batch = stacked([draw(5, 2, 3), draw(5, 4, 1)], [0, 1])
    assert batch.shape == (5, 6, 4)


def test_kernels_flatten_last_and_batches_stay() -> None:
    stored = draw(2, 4, 5, 3, 3)
    assert flat(stored, 4).shape == (2, 4, 45)
    assert torch.equal(flat(stored, 4)[1], stored[1].flatten(1))
    assert flat(stored[0, :, :, 0, 0], 2).shape == (4, 5)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_factors_are_the_matrices_that_they_stand_for(batch: tuple[int, ...]) -> None:
    core, left, right = draw(*batch, 2, 3, 4), draw(*batch, 5, 2), draw(*batch, 3, 6)
    exact = np.einsum("...mr,...rsk,...sd->...mdk", left, core, right).reshape(*batch, 5, 24)
    np.testing.assert_allclose(Tucker(core, left, right).dense().numpy(), exact, rtol=1e-12)
    wide = np.einsum("...rsk,...sd->...rdk", core, right).reshape(*batch, 2, 24)
    np.testing.assert_allclose(spread(core, right).numpy(), wide, rtol=1e-12)
    assert Tucker(core, left, right).rows == Dense(left).rows == Product(left, right).rows == 5
    half = Product(left.half(), left.mT.half())
    assert half.dense().dtype == Dense(left.half()).dense().dtype == torch.float32


class Bare(Weights):
    """A kind that states nothing but what it must: what a newcomer starts from."""

    name = "bare"
    title = "Bare"

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def delta(self) -> torch.Tensor:
        return self.matrix


def test_a_kind_of_delta_alone_can_be_measured_and_merged() -> None:
    matrix = draw(6, 5)
    bare, exact = Bare(matrix), np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(bare.spectrum().numpy(), exact, rtol=1e-6)
    assert bare.norm_squared() == pytest.approx((exact**2).sum(), rel=1e-12)
    assert bare.svd(2).s.numpy() == pytest.approx(exact[:2], rel=1e-6)
    assert bare.rows == 6
    assert torch.equal(bare.apply(torch.ones(6, 5, dtype=torch.float64), 2.0), 1 + 2 * matrix)
    assert (bare.kron_factors(), bare.thin_factors()) == (None, None)
    assert bare.widened() is bare.computed() is bare


@pytest.mark.parametrize(
    "refused",
    [
        lambda bare: bare.factors(),
        lambda bare: bare.times(2.0),
        lambda bare: bare.part(0, 1),
        lambda bare: bare.folded(),
        lambda bare: Bare.sum([bare]),
        lambda bare: Bare.fuse([bare]),
        lambda bare: Bare.zeros(bare, 1),
        lambda bare: Bare.fit(bare.delta(), FitSpec()),
        lambda bare: Bare.exactly(bare, ()),
        lambda bare: Bare.decompose(bare, FitSpec()),
        lambda bare: Bare.decompose_stack(bare, FitSpec()),
        lambda bare: Bare.keep_stack(bare, [], []),
        lambda _: Bare.over(Bare),
    ],
)
def test_what_a_kind_does_not_state_is_refused_by_its_name(refused) -> None:
    with pytest.raises(NotRepresentable, match="bare"):
        refused(Bare(draw(3, 3)))


def test_thin_factors_are_those_of_at_most_half_the_smaller_side() -> None:
    lora = algorithms()["lora"]
    for rank, thin in ((1, True), (4, True), (5, False), (8, False)):
        weights = lora(draw(20, rank), draw(rank, 8), 1.0)
        assert (weights.thin_factors() is not None) == thin, rank
