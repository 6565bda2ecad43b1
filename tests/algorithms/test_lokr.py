from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaptkit.algorithms._factor import Dense, Product
from adaptkit.algorithms.contract import FitSpec, Stated
from adaptkit.algorithms.lokr import Lokr
from adaptkit.errors import NotRepresentable, ShapeMismatch
from tests import oracle
from tests.laws import AlgorithmLaws, Array, Layout

RANDOM = np.random.default_rng(0)


def array(*shape: int) -> Array:
    return RANDOM.standard_normal(shape)


def _w1() -> dict[str, dict[str, Array]]:
    return {"w1": {"w1": array(4, 2)}, "w1 factored": {"w1_a": array(4, 2), "w1_b": array(2, 2)}}


def _w2(kernel: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    window = int(np.prod(kernel))
    forms = {
        "w2": {"w2": array(3, 5, *kernel)},
        "w2 factored": {"w2_a": array(3, 2), "w2_b": array(2, 5 * window)},
    }
    if kernel:
        forms["w2 tucker"] = {"t2": array(2, 2, *kernel), "w2_a": array(2, 3), "w2_b": array(2, 5)}
    return forms


class TestLokr(AlgorithmLaws):
    kind = Lokr
    has_factors = True
    has_alpha = True

    @staticmethod
    def layouts() -> Iterator[Layout]:
        for kernel in ((), (3, 3), (1, 1), (3,), (2, 1, 3)):
            for one, first in _w1().items():
                for two, second in _w2(kernel).items():
                    for alpha in (None, 3.0):
                        yield Layout(
                            f"{one}, {two}, kernel {kernel}, alpha {alpha}",
                            {**first, **second},
                            alpha,
                            kernel,
                        )
        # ai-toolkit writes alpha ≈ 1e10, which is infinite in fp16, beside two full factors
        for alpha in (9999220736.0, float("inf")):
            yield Layout(
                f"full factors, alpha {alpha}", {"w1": array(4, 2), "w2": array(3, 5)}, alpha
            )

    @staticmethod
    def oracle(layout: Layout) -> Array:
        return oracle.lokr_stored(layout.tensors, layout.alpha, layout.kernel)

    @staticmethod
    def block(layout: Layout) -> int:
        """The rows of W2, whose factor is stored transposed beside a Tucker core."""
        shapes = layout.shapes()
        if "w2" in shapes:
            return shapes["w2"][0]
        return shapes["w2_a"]["t2" in shapes]


def test_w2_b_with_kernel_dimensions_is_read() -> None:
    tensors = {"w1": array(2, 2), "w2_a": array(3, 2), "w2_b": array(2, 5, 3, 3)}
    facts = Lokr.facts({role: t.shape for role, t in tensors.items()}, Stated(2.0))
    assert facts.kernel == (3, 3)
    weights = Lokr.decode({role: torch.from_numpy(t) for role, t in tensors.items()}, facts)
    expected = oracle.lokr_stored(tensors, 2.0, (3, 3))
    np.testing.assert_allclose(weights.delta().numpy(), expected.reshape(6, -1))


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1": (4, 2, 2), "w2": (3, 5)},
        {"w1_a": (4, 2), "w1_b": (3, 2), "w2": (3, 5)},
        {"w1": (4, 2), "w2_a": (3, 2), "w2_b": (3, 5)},
        {"w1": (4, 2), "w2": (3,)},
        {"w1": (4, 2), "t2": (2, 2, 3, 3), "w2_a": (3, 3), "w2_b": (2, 5)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMismatch):
        Lokr.facts(shapes)


def test_a_cut_through_a_block_is_refused() -> None:
    weights = Lokr(Dense(torch.ones(4, 2)), Dense(torch.ones(3, 5)), 1.0)
    with pytest.raises(NotRepresentable, match="blocks? of 3"):
        weights.part(1, 7)
    assert weights.part(3, 9).delta().shape == (6, 10)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_fit_is_the_nearest_kronecker_product(kernel: tuple[int, ...]) -> None:
    window = int(np.prod(kernel))
    delta = torch.from_numpy(array(24, 40 * window))
    fitted = Lokr.fit(delta, FitSpec(None, kernel, factor=4))
    assert isinstance(fitted.w1, Dense)
    assert fitted.w1.matrix.shape == (4, 4)
    assert {role: tuple(t.shape) for role, t in fitted.encode().items()} == {
        "w1": (4, 4),
        "w2": (6, 10, *kernel),
        "alpha": (),
    }
    assert float((fitted.delta() - delta).norm()) == pytest.approx(
        oracle.best_kron(delta.numpy(), 4, 4), rel=1e-6
    )


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_fit_recovers_a_low_rank_lokr(kernel: tuple[int, ...]) -> None:
    window = int(np.prod(kernel))
    w1, a, b = array(4, 4), array(16, 2), array(2, 20 * window)
    delta = torch.from_numpy(oracle.lokr(w1, a @ b))
    fitted = Lokr.fit(delta, FitSpec(2, kernel, factor=4))
    stored = fitted.encode()
    # what LyCORIS and ComfyUI both load: w2_b flat, alpha = rank
    assert {role: tuple(t.shape) for role, t in stored.items()} == {
        "w1": (4, 4),
        "w2_a": (16, 2),
        "w2_b": (2, 20 * window),
        "alpha": (),
    }
    assert float(stored["alpha"]) == 2.0
    torch.testing.assert_close(fitted.delta(), delta, rtol=1e-5, atol=1e-5)


def test_w2_is_written_full_once_the_rank_reaches_half_of_its_larger_side() -> None:
    """LyCORIS fails to load anything else (reference §3.5)."""
    delta = torch.from_numpy(array(64, 80))
    assert isinstance(Lokr.fit(delta, FitSpec(9, factor=4)).w2, Product)
    assert isinstance(Lokr.fit(delta, FitSpec(10, factor=4)).w2, Dense)


def test_two_full_factors_take_a_scale_only_from_a_peft_configuration() -> None:
    tensors = {"w1": torch.ones(2, 2), "w2": torch.ones(3, 5)}
    shapes = {role: tuple(t.shape) for role, t in tensors.items()}
    assert Lokr.facts(shapes, Stated(8.0)).scale == 1.0
    facts = Lokr.facts(shapes, Stated(32.0, rank=64))
    assert facts.scale == 0.5
    stored = Lokr.decode(tensors, facts).encode()
    assert torch.equal(stored["w1"], torch.full((2, 2), 0.5))  # where every reader finds it
    assert float(stored["alpha"]) == 1.0
