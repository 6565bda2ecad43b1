from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaptkit.algorithms.contract import FitSpec, Stated
from adaptkit.algorithms.lora import Lora
from adaptkit.errors import NonFinite, ShapeMismatch
from adaptkit.keymap import split_suffix
from tests import oracle
from tests.laws import AlgorithmLaws, Array, Layout

RANDOM = np.random.default_rng(0)


def array(*shape: int) -> Array:
    return RANDOM.standard_normal(shape)


class TestLora(AlgorithmLaws):
    kind = Lora
    has_factors = True
    has_alpha = True

    @staticmethod
    def layouts() -> Iterator[Layout]:
        yield Layout("linear", {"up": array(12, 3), "down": array(3, 10)}, 1.5)
        yield Layout("linear, no alpha", {"up": array(12, 3), "down": array(3, 10)})
        yield Layout("conv 3×3", {"up": array(12, 3, 1, 1), "down": array(3, 5, 3, 3)}, 1.0, (3, 3))
        yield Layout("conv 1×1", {"up": array(12, 2, 1, 1), "down": array(2, 5, 1, 1)}, 4.0, (1, 1))
        yield Layout("conv 1-D", {"up": array(12, 2, 1), "down": array(2, 5, 3)}, 4.0, (3,))
        yield Layout(
            "conv 3-D, not cubic",
            {"up": array(12, 2, 1, 1, 1), "down": array(2, 5, 1, 2, 3)},
            4.0,
            (1, 2, 3),
        )
        yield Layout(
            "tucker",
            {"up": array(12, 3, 1, 1), "down": array(3, 5, 1, 1), "mid": array(3, 3, 3, 3)},
            2.0,
            (3, 3),
        )
        yield Layout(
            "tucker 1-D",
            {"up": array(12, 3, 1), "down": array(3, 5, 1), "mid": array(3, 3, 5)},
            2.0,
            (5,),
        )
        yield Layout("negative alpha", {"up": array(12, 3), "down": array(3, 10)}, -1.5)

    @staticmethod
    def oracle(layout: Layout) -> Array:
        rank = layout.tensors["down"].shape[0]
        scale = 1.0 if layout.alpha is None else layout.alpha / rank
        return oracle.lora(
            layout.tensors["up"], layout.tensors["down"], scale, layout.tensors.get("mid")
        )


@pytest.mark.parametrize(
    "shapes",
    [
        {"up": (12, 3), "down": (4, 10)},
        {"up": (12, 0), "down": (0, 10)},
        {"up": (12,), "down": (3, 10)},
        {"up": (12, 3, 3, 3), "down": (3, 10, 1, 1)},
        {"up": (12, 3, 1, 1), "down": (3, 5, 1, 1), "mid": (2, 2, 3, 3)},
        {"up": (12, 3, 1, 1), "down": (3, 5, 3, 3), "mid": (3, 3, 3, 3)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        Lora.facts(shapes)


def test_a_1x1_convolution_may_store_a_flat_up() -> None:
    facts = Lora.facts({"up": (12, 2), "down": (2, 5, 1, 1)}, Stated(2.0))
    weights = Lora.decode({"up": torch.ones(12, 2), "down": torch.ones(2, 5, 1, 1)}, facts)
    assert torch.equal(weights.delta(), torch.full((12, 5), 2.0))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_non_finite_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(NonFinite, match="alpha"):
        Lora.facts({"up": (12, 3), "down": (3, 10)}, Stated(alpha))


def test_rank_scaled_alpha_divides_by_the_root() -> None:
    assert Lora.facts({"up": (12, 4), "down": (4, 10)}, Stated(8.0, rank_scaled=True)).scale == 4.0


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(40, 24, 5), (24, 40, 5), (40, 24, 99), (7, 7, 7)]
)
def test_fit_is_the_best_of_its_rank(rows: int, columns: int, rank: int) -> None:
    delta = torch.from_numpy(RANDOM.standard_normal((rows, columns)))
    fitted = Lora.fit(delta, FitSpec(rank))
    error = float((fitted.delta() - delta).norm())
    assert error == pytest.approx(
        oracle.best_rank(delta.numpy(), min(rank, rows, columns)), rel=1e-6, abs=1e-6
    )
    assert fitted.up.norm(dim=0).numpy() == pytest.approx(
        fitted.down.norm(dim=1).numpy(), rel=1e-5
    )  # balanced


@pytest.mark.parametrize(
    ("suffix", "role"),
    [
        ("lora_A", "down"),
        ("lora_B", "up"),
        ("lora_A.default", "down"),
        ("lora_B.default.weight", "up"),
        ("lora.down.weight", "down"),
        ("lora_linear_layer.up.weight", "up"),
    ],
)
def test_spellings_of_its_factors(suffix: str, role: str) -> None:
    """Mochi's trainer writes no `.weight`, PEFT perhaps the adapter's name (reference, formats §4)."""
    split = split_suffix(f"blocks.0.attn1.to_q.{suffix}")
    assert split is not None
    assert split[0] == "blocks.0.attn1.to_q"
    assert dict(split[2])["lora"] == role


def test_a_block_comes_back_at_its_own_rank() -> None:
    draw = torch.Generator().manual_seed(3)
    ranks = (2, 3, 1)
    parts = [
        Lora(torch.randn(4, r, generator=draw), torch.randn(r, 6, generator=draw), 0.5)
        for r in ranks
    ]
    whole = Lora.fuse(parts)
    for n, part in enumerate(parts):
        found = whole.own_part(4 * n, 4 * n + 4)
        assert torch.equal(found.up, part.up)
        assert torch.equal(found.down, part.down)
        assert found.scale == part.scale


def test_a_block_keeps_the_columns_that_other_rows_share() -> None:
    up = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 4.0, 5.0], [0.0, 0.0, 6.0]])
    whole = Lora(up, torch.arange(12.0).reshape(3, 4), 1.0)
    for start, stop in ((0, 2), (2, 4)):
        assert torch.equal(whole.own_part(start, stop).up, up[start:stop])
    again = Lora.fuse([whole.own_part(0, 2), whole.own_part(2, 4)])
    assert torch.equal(again.up, up)


def test_a_block_of_zeros_is_kept() -> None:
    whole = Lora(torch.zeros(4, 2).index_fill_(0, torch.tensor([0, 1]), 1.0), torch.ones(2, 3), 1.0)
    assert whole.own_part(2, 4).up.shape == (2, 2)
