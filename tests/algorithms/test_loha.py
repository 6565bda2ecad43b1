from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from adaptkit.algorithms.loha import Loha
from adaptkit.errors import ShapeMismatch
from tests import oracle
from tests.laws import AlgorithmLaws, Array, Layout

RANDOM = np.random.default_rng(0)


def array(*shape: int) -> Array:
    return RANDOM.standard_normal(shape)


class TestLoha(AlgorithmLaws):
    kind = Loha
    has_factors = True
    has_alpha = True

    @staticmethod
    def layouts() -> Iterator[Layout]:
        for alpha in (None, 1.5):
            flat = {
                "w1_a": array(12, 3),
                "w1_b": array(3, 10),
                "w2_a": array(12, 3),
                "w2_b": array(3, 10),
            }
            yield Layout(f"linear, alpha {alpha}", flat, alpha)
            conv = {
                "w1_a": array(12, 2),
                "w1_b": array(2, 45),
                "w2_a": array(12, 2),
                "w2_b": array(2, 45),
            }
            yield Layout(f"conv 3×3, flat, alpha {alpha}", conv, alpha, (3, 3))
            for kernel in ((3, 3), (3,), (1, 2, 3)):
                tucker = {f"w{n}_a": array(3, 12) for n in (1, 2)} | {
                    f"w{n}_b": array(3, 5) for n in (1, 2)
                }
                yield Layout(
                    f"tucker {kernel}",
                    tucker | {f"t{n}": array(3, 3, *kernel) for n in (1, 2)},
                    alpha,
                    kernel,
                )

    @staticmethod
    def oracle(layout: Layout) -> Array:
        return oracle.loha(layout.tensors, layout.alpha, layout.kernel)


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1_a": (12, 3), "w1_b": (3, 10), "w2_a": (12, 3), "w2_b": (3, 11)},
        {"w1_a": (12, 3), "w1_b": (4, 10), "w2_a": (12, 3), "w2_b": (3, 10)},
        {"w1_a": (12, 0), "w1_b": (0, 10), "w2_a": (12, 0), "w2_b": (0, 10)},
        {
            "w1_a": (3, 12),
            "w1_b": (3, 5),
            "t1": (2, 3, 3, 3),
            "w2_a": (3, 12),
            "w2_b": (3, 5),
            "t2": (3, 3, 3, 3),
        },
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        Loha.facts(shapes)
