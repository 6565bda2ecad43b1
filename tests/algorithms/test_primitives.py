"""part, fuse, zeros, swapped, folded and factors of the additive kinds: exact, for every stored form."""

from __future__ import annotations

import pytest
import torch

from adaptkit.algorithms.contract import Stated, Weights
from adaptkit.errors import NotRepresentable
from adaptkit.keymap import algorithms

ROWS, COLUMNS = 12, 10


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


FORMS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "lora": ("lora", {"up": (ROWS, 3), "down": (3, COLUMNS)}),
    "lora-conv": ("lora", {"up": (ROWS, 3, 1, 1), "down": (3, 5, 3, 3)}),
    "lora-tucker": ("lora", {"up": (ROWS, 3, 1, 1), "mid": (3, 3, 3, 3), "down": (3, 5, 1, 1)}),
    "loha": (
        "loha",
        {"w1_a": (ROWS, 2), "w1_b": (2, COLUMNS), "w2_a": (ROWS, 2), "w2_b": (2, COLUMNS)},
    ),
    "loha-tucker": (
        "loha",
        {
            "w1_a": (2, ROWS),
            "w1_b": (2, 5),
            "t1": (2, 2, 3, 3),
            "w2_a": (2, ROWS),
            "w2_b": (2, 5),
            "t2": (2, 2, 3, 3),
        },
    ),
    "lokr": ("lokr", {"w1": (6, 2), "w2": (2, 5)}),
    "lokr-low": ("lokr", {"w1": (6, 2), "w2_a": (2, 1), "w2_b": (1, 5)}),
    "lokr-both": ("lokr", {"w1_a": (6, 2), "w1_b": (2, 2), "w2_a": (2, 1), "w2_b": (1, 5)}),
    "lokr-conv": ("lokr", {"w1": (6, 1), "w2": (2, 5, 3, 3)}),
    "lokr-tucker": ("lokr", {"w1": (6, 1), "t2": (2, 2, 3, 3), "w2_a": (2, 2), "w2_b": (2, 5)}),
    "full": ("full", {"diff": (ROWS, COLUMNS)}),
}


def made(form: str, *, seed: int = 0, alpha: float = 1.5) -> Weights:
    name, shapes = FORMS[form]
    kind = algorithms()[name]
    tensors = {role: draw(*shape, seed=seed) for role, shape in shapes.items()}
    return kind.decode(tensors, kind.facts(shapes, Stated(alpha)))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def test_parts_fuse_back_to_the_thing_itself(form: str) -> None:
    """Cut in two and put together: the same ΔW, and the same tensors where the cut falls between blocks."""
    whole = made(form)
    again = type(whole).fuse([whole.part(0, 4), whole.part(4, ROWS)])
    torch.testing.assert_close(again.delta(), whole.delta())
    ours, theirs = whole.encode(), again.encode()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[role]) for role, tensor in ours.items())


def test_missing_parts_are_zeros(form: str) -> None:
    part = made(form).part(4, 8)
    filled = type(part).fuse([type(part).zeros(part, 4), part, type(part).zeros(part, 4)])
    assert filled.rows == ROWS
    torch.testing.assert_close(filled.delta()[4:8], made(form).delta()[4:8])
    assert not filled.delta()[:4].any()
    assert not filled.delta()[8:].any()


def test_different_things_fuse_or_are_refused(form: str) -> None:
    one, other = made(form), made(form, seed=1, alpha=0.5)
    if form in ("lora-tucker", "loha-tucker") or form.startswith("lokr"):
        with pytest.raises(NotRepresentable) as caught:
            type(one).fuse([one, other])
        assert caught.value.hint
        return
    fused = type(one).fuse([one, other])
    torch.testing.assert_close(
        fused.delta(), torch.cat([one.delta(), other.delta()]), rtol=1e-5, atol=1e-5
    )


def test_swapped_exchanges_the_halves(form: str) -> None:
    whole = made(form)
    half = ROWS // 2
    torch.testing.assert_close(
        whole.swapped().delta(), torch.cat([whole.delta()[half:], whole.delta()[:half]])
    )
    torch.testing.assert_close(whole.swapped().swapped().delta(), whole.delta())


def test_folded_has_scale_one(form: str) -> None:
    whole = made(form)
    folded = whole.folded()
    assert getattr(folded, "scale", 1.0) == 1.0
    torch.testing.assert_close(folded.delta(), whole.delta())


def test_a3_factors_are_exact(form: str) -> None:
    whole = made(form)
    if form == "full":
        with pytest.raises(NotRepresentable):
            whole.factors()
        return
    left, right = whole.factors()
    torch.testing.assert_close(left @ right, whole.delta(), rtol=1e-5, atol=1e-5)


def test_the_norm_is_that_of_the_difference(form: str) -> None:
    whole = made(form)
    assert whole.norm_squared() == pytest.approx(
        float(whole.delta().double().square().sum()), rel=1e-5
    )


def test_exactly_another_kind(form: str) -> None:
    whole = made(form)
    kernel = (3, 3) if whole.delta().shape[1] == 45 else ()
    for name in ("lora", "full"):
        if name == "lora" and form == "full":
            continue
        other = algorithms()[name].exactly(whole, kernel)
        torch.testing.assert_close(other.delta(), whole.delta(), rtol=1e-5, atol=1e-5)
        with pytest.raises(NotRepresentable, match="kernel size"):
            algorithms()[name].exactly(whole, None)
    if not form.startswith("lokr"):
        with pytest.raises(NotRepresentable, match="no lokr exactly"):
            algorithms()["lokr"].exactly(whole, kernel)
