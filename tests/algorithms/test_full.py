from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaptkit.algorithms.contract import FitSpec
from adaptkit.algorithms.full import Full
from adaptkit.errors import ShapeMismatch
from tests.laws import AlgorithmLaws, Array, Layout

RANDOM = np.random.default_rng(0)


class TestFull(AlgorithmLaws):
    kind = Full
    has_factors = False
    has_alpha = False

    @staticmethod
    def layouts() -> Iterator[Layout]:
        yield Layout("linear", {"diff": RANDOM.standard_normal((8, 6))})
        yield Layout("conv", {"diff": RANDOM.standard_normal((8, 6, 3, 3))}, None, (3, 3))
        yield Layout("bias", {"diff_b": RANDOM.standard_normal(8)})
        yield Layout("norm weight", {"w_norm": RANDOM.standard_normal(8)})
        yield Layout("norm bias", {"b_norm": RANDOM.standard_normal(8)})

    @staticmethod
    def oracle(layout: Layout) -> Array:
        (array,) = layout.tensors.values()
        return array


def test_fit_is_the_difference() -> None:
    delta = torch.randn(8, 54)
    assert torch.equal(
        Full.fit(delta, FitSpec(kernel=(3, 3))).encode()["diff"], delta.reshape(8, 6, 3, 3)
    )


def test_a_scalar_is_refused() -> None:
    with pytest.raises(ShapeMismatch):
        Full.facts({"diff": ()})
