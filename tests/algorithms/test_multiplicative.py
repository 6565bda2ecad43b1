"""Kinds that are no difference: DoRA, OFT, BOFT, GLoRA, IA³ and replaced weights, against float64 oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from adaptkit.algorithms._settings import Wanted
from adaptkit.algorithms.contract import Facts, Stated, Weights
from adaptkit.errors import NotRepresentable, ShapeMismatch
from adaptkit.keymap import algorithms
from adaptkit.linalg import precision
from adaptkit.ops.merge.cutting import Part
from tests import oracle

ROWS, INPUTS = 16, 8
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One stored layout: its tensors, alpha, the base's kernel, and W' as the oracle has it."""

    name: str
    algorithm: str
    tensors: Tensors
    merged: Callable[[np.ndarray], np.ndarray]
    alpha: float | None = None
    kernel: tuple[int, ...] = ()
    cuts: bool = True  # whether rows can be cut out exactly


def draw(*shape: int, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    return (
        torch.randn(
            *shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64
        )
        * scale
    )


def numpy(tensors: Tensors) -> dict[str, np.ndarray]:
    return {role: tensor.numpy() for role, tensor in tensors.items()}


def rotations() -> list[Case]:
    found = []
    for alpha in (0.0, 0.01):
        for rescaled in (False, True):
            for name, shape, function in (
                ("oft", (4, 4, 4), oracle.oft),
                ("boft", (3, 4, 4, 4), oracle.boft),
            ):
                blocks, extra = (
                    draw(*shape),
                    {"rescale": draw(ROWS, 1).abs() + 0.5} if rescaled else {},
                )
                scale = extra["rescale"].numpy() if rescaled else None
                label = f"{name}-alpha{alpha}-{'rescaled' if rescaled else 'plain'}"

                def merged(
                    w: np.ndarray,
                    f: Callable[..., np.ndarray] = function,
                    b: torch.Tensor = blocks,
                    a: float = alpha,
                    s: np.ndarray | None = scale,
                ) -> np.ndarray:
                    return f(w, b.numpy(), a * ROWS, s)

                found.append(
                    Case(
                        label,
                        name,
                        {"blocks": blocks, **extra},
                        merged,
                        alpha,
                        cuts=name == "oft" and not alpha,
                    )
                )
    parts = {"part0": draw(2, 4, 4), "part1": draw(2, 2, 2), "part2": draw(1, 4, 4)}
    for alpha in (1.0, 0.01):
        stored = [part.numpy() for part in parts.values()]
        found.append(
            Case(
                f"kohya-oft-{alpha}",
                "kohya-oft",
                parts,
                lambda w, s=stored, a=alpha: oracle.kohya_oft(w, s, a),
                alpha,
                cuts=False,
            )
        )
        whole = draw(4, 4, 4)
        found.append(
            Case(
                f"kohya-oft-whole-{alpha}",
                "kohya-oft",
                {"blocks": whole},
                lambda w, b=whole, a=alpha: oracle.kohya_oft(w, [b.numpy()], a),
                alpha,
                cuts=False,
            )
        )
    for kernel in ((), (3, 3)):
        window = int(np.prod(kernel))
        for count in (INPUTS * window // 4, 1):
            packed = draw(count, 6, scale=0.1)
            found.append(
                Case(
                    f"peft-oft-{kernel}-{count}",
                    "peft-oft",
                    {"packed": packed},
                    lambda w, p=packed: oracle.peft_oft(w, p.numpy(), 4),
                    kernel=kernel,
                )
            )
        packed = draw(INPUTS * window // 4, 6, scale=0.3)
        found.append(
            Case(
                f"onetrainer-oft-{kernel}",
                "peft-oft",
                {"packed": packed, "scaled": torch.tensor(True)},
                lambda w, p=packed: oracle.peft_oft(w, p.numpy(), 4, scaled=True),
                kernel=kernel,
            )
        )
        for stages, size in ((1, 1), (1, 4), (2, 4), (3, 2)):
            blocks = draw(stages, INPUTS * window // size, size, size)
            factor = draw(1, ROWS) if kernel else draw(ROWS, 1)
            found.append(
                Case(
                    f"peft-boft-{kernel}-{stages}-{size}",
                    "peft-boft",
                    {"blocks": blocks, "factor": factor},
                    lambda w, b=blocks, f=factor: oracle.peft_boft(w, b.numpy(), f.numpy()),
                    kernel=kernel,
                )
            )
    return found


def doras() -> list[Case]:
    found = []
    for kernel in ((), (3, 3)):
        ones = (1,) * len(kernel)
        up, down = draw(ROWS, 2, *ones), draw(2, INPUTS, *kernel)
        delta = np.einsum("or,r...->o...", up.reshape(ROWS, 2).numpy(), down.numpy()) * 0.5
        for role, shape, axis in (
            ("magnitude", (ROWS, 1, *ones), 0),
            ("magnitude", (1, INPUTS, *ones), 1),
            ("magnitude", (ROWS,), 0),
            ("vector", (1, ROWS, *ones) if kernel else (ROWS,), 0),
        ):
            m = draw(*shape).abs() + 0.5

            def merged(
                w: np.ndarray, d: np.ndarray = delta, m: torch.Tensor = m, a: int = axis
            ) -> np.ndarray:
                return oracle.dora(w, d, m.numpy().reshape(-1), a)

            found.append(
                Case(
                    f"dora-{role}-{shape}",
                    "lora+dora",
                    {"up": up, "down": down, role: m},
                    merged,
                    1.0,
                    kernel,
                    axis == 0,
                )
            )
    return found


def others() -> list[Case]:
    found = []
    for kernel in ((), (3, 3)):
        ones = (1,) * len(kernel)
        glora = {
            "a1": draw(INPUTS, 2, *ones),
            "a2": draw(2, INPUTS, *ones),
            "b1": draw(ROWS, 2, *ones),
            "b2": draw(2, INPUTS, *kernel),
        }
        found.append(
            Case(
                f"glora-{kernel}",
                "glora",
                glora,
                lambda w, t=glora: oracle.glora(w, numpy(t), 1.5),
                3.0,
                kernel,
            )
        )
        for on_input in (0, 1):
            count = INPUTS if on_input else ROWS
            weight = draw(1, count, *ones) if kernel else draw(count)
            stored = {"weight": weight, "on_input": torch.tensor(on_input)}
            found.append(
                Case(
                    f"ia3-{kernel}-{on_input}",
                    "ia3",
                    stored,
                    lambda w, t=weight, a=on_input: oracle.ia3(w, t.numpy(), a),
                    kernel=kernel,
                )
            )
    for shape, axis in (((1, INPUTS), 1), ((ROWS, 1), 0)):
        factor = draw(*shape) + 1
        found.append(
            Case(
                f"ia3-peft-{axis}",
                "ia3",
                {"factor": factor},
                lambda w, f=factor, a=axis: oracle.ia3(w, f.numpy() - 1, a),
            )
        )
    value = draw(ROWS, INPUTS)
    found.append(Case("set", "set", {"value": value}, lambda _, v=value: v.numpy()))
    return found


CASES = [*rotations(), *doras(), *others()]


def opened(case: Case, tensors: Tensors | None = None) -> Weights:
    kind = algorithms()[case.algorithm]
    shapes = {role: tuple(t.shape) for role, t in case.tensors.items()}
    assert frozenset(shapes) in kind.forms
    facts = kind.facts(shapes, None if case.alpha is None else Stated(case.alpha))
    if facts.kernel is None:
        facts = replace(facts, kernel=case.kernel)  # as the family's table tells the reader
    return kind.decode(tensors or case.tensors, facts)


def base(case: Case) -> torch.Tensor:
    return draw(ROWS, INPUTS, *case.kernel, seed=3, scale=1.0)


def flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(ROWS, -1).clone()


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def check_merged(case: Case, merged: torch.Tensor) -> None:
    exact = case.merged(base(case).numpy())
    np.testing.assert_allclose(
        merged.reshape(exact.shape).numpy(), exact, rtol=1e-12, atol=1e-12, err_msg=case.name
    )


def test_a1_the_merged_weight_is_the_oracles(case: Case) -> None:
    check_merged(case, opened(case).apply(flat(base(case)), 1.0))


def test_a1_notices_planted_faults(case: Case) -> None:
    """What comes near: nothing done, a strength a little off, float32, one sign, other rows."""
    right = opened(case).apply(flat(base(case)), 1.0)
    one_sign = right.clone()
    one_sign.view(-1)[right.abs().argmin()] *= -1
    faults = {
        "nothing": flat(base(case)),
        "strength": opened(case).apply(flat(base(case)), 1 - 1e-6),
        "float32": right.float().double(),
        "sign": one_sign,
        "rows": right.roll(1, -2),
    }
    for wrong in faults.values():
        with pytest.raises(AssertionError):
            check_merged(case, wrong)


def test_a2_stored_shapes_come_back(case: Case) -> None:
    encoded = opened(case).encode()
    stored = {
        algorithms()[case.algorithm].stored_as(role, peft="vector" in case.tensors): t
        for role, t in encoded.items()
    }
    for role, tensor in case.tensors.items():
        assert torch.equal(stored[role].reshape(-1).double(), tensor.reshape(-1).double()), role
        if role not in ("magnitude", "vector"):
            assert stored[role].shape == tensor.shape
    if case.alpha is not None:
        assert float(stored["alpha"]) == pytest.approx(case.alpha)


def test_a4_parts_act_on_their_rows_alone(case: Case) -> None:
    weights = opened(case)
    if not case.cuts:
        with pytest.raises(NotRepresentable):
            weights.part(2, 10)
        return
    whole = weights.apply(flat(base(case)), 1.0)
    part = weights.part(4, 12).apply(flat(base(case))[4:12].clone(), 1.0)
    torch.testing.assert_close(part, whole[4:12])


def test_a5_a_batch_is_its_members(case: Case) -> None:
    stack = {
        role: torch.stack([tensor, tensor * 0.9 if tensor.is_floating_point() else tensor])
        for role, tensor in case.tensors.items()
    }
    two = opened(case, stack).apply(torch.stack([flat(base(case))] * 2), 1.0)
    for n in range(2):
        one = opened(case, {role: tensor[n] for role, tensor in stack.items()}).apply(
            flat(base(case)), 1.0
        )
        torch.testing.assert_close(two[n], one)
        member = opened(case, stack).member(n)
        torch.testing.assert_close(member.apply(flat(base(case)), 1.0), one)
        for role, tensor in member.encode().items():
            assert role == "alpha" or tensor.shape == opened(case).encode()[role].shape


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_some_rows_of_a_tensor_are_changed_in_place(
    case: Case, batch: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused layer holds the rows of several: a slice of a stack, perhaps of one tensor. In blocks of rows, too."""
    monkeypatch.setattr(precision, "SCRATCH", 5 * flat(base(case)).shape[-1])
    members = {role: torch.stack([tensor] * batch) for role, tensor in case.tensors.items()}
    weight = flat(base(case))
    whole = torch.zeros(batch, ROWS + 7, weight.shape[-1], dtype=weight.dtype)
    whole[:, 3 : 3 + ROWS] = weight
    Part(opened(case, members), 3, 3 + ROWS, None).add(whole, strength)
    expected = opened(case).apply(weight, strength)
    for member in whole:
        torch.testing.assert_close(member[3 : 3 + ROWS], expected)
        assert not member[:3].any()
        assert not member[3 + ROWS :].any()


def test_strength_goes_from_the_base_to_the_merged_weight(case: Case) -> None:
    before, after = flat(base(case)), opened(case).apply(flat(base(case)), 1.0)
    torch.testing.assert_close(opened(case).apply(flat(base(case)), 0.0), before)
    half = opened(case).apply(flat(base(case)), 0.5)
    torch.testing.assert_close(half, (before + after) / 2)


def test_a_difference_is_refused_with_a_hint(case: Case) -> None:
    with pytest.raises(NotRepresentable) as caught:
        opened(case).delta()
    assert caught.value.hint


def test_folding_keeps_what_it_does(case: Case) -> None:
    folded = opened(case).folded()
    torch.testing.assert_close(
        folded.apply(flat(base(case)), 1.0),
        opened(case).apply(flat(base(case)), 1.0),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_doras_fuse_and_swap_by_rows(kernel: tuple[int, ...]) -> None:
    output = next(c for c in doras() if c.kernel == kernel and "magnitude" in c.tensors)
    weights, weight = opened(output), flat(base(output))
    again = type(weights).fuse([weights.part(0, 6), weights.part(6, ROWS)])
    torch.testing.assert_close(again.apply(weight.clone(), 1.0), weights.apply(weight.clone(), 1.0))
    swapped = weights.swapped().apply(torch.cat([weight[8:], weight[:8]]), 1.0)
    torch.testing.assert_close(
        torch.cat([swapped[8:], swapped[:8]]), weights.apply(weight.clone(), 1.0)
    )
    inputs = next(
        c
        for c in doras()
        if c.kernel == kernel and c.tensors.get("magnitude", draw(2, 2)).shape[0] == 1
    )
    weights = opened(inputs)
    swapped = weights.swapped().apply(torch.cat([weight[8:], weight[:8]]), 1.0)
    torch.testing.assert_close(
        torch.cat([swapped[8:], swapped[:8]]), weights.apply(weight.clone(), 1.0)
    )
    with pytest.raises(NotRepresentable, match="input axis"):
        type(weights).fuse([weights, weights])


def test_shapes_that_do_not_fit() -> None:
    for algorithm, shapes in (
        ("oft", {"blocks": (2, 4, 4, 4)}),
        ("boft", {"blocks": (4, 4, 4)}),
        ("oft", {"blocks": (4, 4, 5)}),
        ("oft", {"blocks": (4, 4, 4), "rescale": (8, 1)}),
        ("lora+dora", {"up": (8, 2), "down": (2, 6), "magnitude": (7, 1)}),
        ("glora", {"a1": (8, 2), "a2": (2, 8), "b1": (16, 3), "b2": (2, 8)}),
        ("peft-oft", {"packed": (4, 7)}),
        ("ia3", {"factor": (3, 4)}),
        ("peft-boft", {"blocks": (2, 3, 4, 4), "factor": (8, 1)}),
        ("peft-boft", {"blocks": (2, 4, 3, 3), "factor": (8, 1)}),
        ("peft-boft", {"blocks": (1, 4, 3, 3), "factor": (8, 2)}),
    ):
        with pytest.raises(ShapeMismatch):
            algorithms()[algorithm].facts(shapes)


def test_magnitudes_change_their_layout_between_lycoris_and_peft() -> None:
    kind = algorithms()["lora+dora"]
    linear, conv = Facts(16, 8, (), 2, 1.0), Facts(16, 72, (3, 3), 2, 1.0)
    assert kind.laid_out("magnitude", (16, 1), linear, peft=True) == (16,)
    assert kind.laid_out("vector", (16,), linear, peft=False) == (16, 1)
    assert kind.laid_out("magnitude", (16, 1, 1, 1), conv, peft=True) == (1, 16, 1, 1)
    assert kind.laid_out("magnitude", (1, 8, 1, 1), conv, peft=False) == (1, 8, 1, 1)
    with pytest.raises(NotRepresentable, match="no PEFT form"):
        kind.laid_out("magnitude", (1, 8, 1, 1), conv, peft=True)
    assert (kind.stored_as("magnitude", peft=True), kind.stored_as("vector", peft=False)) == (
        "vector",
        "magnitude",
    )


def by_name(name: str) -> Weights:
    return opened(next(c for c in CASES if c.name == name))


BY_ROWS = [
    "oft-alpha0.0-plain",
    "oft-alpha0.0-rescaled",
    "ia3-()-0",
    "ia3-(3, 3)-0",
    "ia3-peft-0",
    "glora-()",
]
BY_COLUMNS = [
    "ia3-()-1",
    "ia3-(3, 3)-1",
    "ia3-peft-1",
    "peft-oft-()-2",
    "onetrainer-oft-()",
    "peft-boft-()-2-4",
]


@pytest.mark.parametrize("name", [*BY_ROWS, *BY_COLUMNS])
def test_parts_fuse_back_to_the_thing_itself(name: str) -> None:
    whole = by_name(name)
    again = type(whole).fuse([whole.part(0, 4), whole.part(4, ROWS)])
    ours, theirs = whole.encode(), again.encode()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[role]) for role, tensor in ours.items())


@pytest.mark.parametrize("name", [*BY_ROWS, *BY_COLUMNS, "oft-alpha0.01-rescaled"])
def test_swapped_exchanges_the_halves(name: str) -> None:
    weights, weight = by_name(name), draw(ROWS, *((INPUTS * 9,) if "(3, 3)" in name else (INPUTS,)))
    swapped = weights.swapped().apply(weight.roll(ROWS // 2, 0), 1.0).roll(ROWS // 2, 0)
    torch.testing.assert_close(swapped, weights.apply(weight.clone(), 1.0))


@pytest.mark.parametrize("name", BY_ROWS[:-1])
def test_missing_parts_leave_their_rows_alone(name: str) -> None:
    weight = draw(ROWS, INPUTS * 9 if "(3, 3)" in name else INPUTS)
    part = by_name(name).part(4, 8)
    filled = (
        type(part)
        .fuse([type(part).zeros(part, 4), part, type(part).zeros(part, 8)])
        .apply(weight.clone(), 1.0)
    )
    torch.testing.assert_close(filled[4:8], by_name(name).apply(weight.clone(), 1.0)[4:8])
    assert torch.equal(filled[:4], weight[:4])
    assert torch.equal(filled[8:], weight[8:])


@pytest.mark.parametrize(
    "name", ["glora-()", "ia3-()-1", "peft-oft-()-2", "peft-boft-()-2-4", "oft-alpha0.01-plain"]
)
def test_what_acts_differently_on_its_rows_is_not_fused(name: str) -> None:
    one = by_name(name)
    case = next(c for c in CASES if c.name == name)
    tensors = {role: t * 2 if t.is_floating_point() else t for role, t in case.tensors.items()}
    with pytest.raises(NotRepresentable) as caught:
        type(one).fuse([one, opened(case, tensors)])
    assert caught.value.hint
    if name != "oft-alpha0.01-plain":
        with pytest.raises(NotRepresentable):
            type(one).zeros(one, 4)


def test_parts_of_an_sd_scripts_oft_stand_alone() -> None:
    case = next(c for c in CASES if c.name == "kohya-oft-0.01")
    weight = flat(base(case))
    whole = opened(case).apply(weight.clone(), 1.0)
    for start, stop in ((0, 8), (8, 12), (12, 16), (0, 12), (8, 16), (0, 16)):
        part = opened(case).part(start, stop)
        assert part.rows == stop - start
        torch.testing.assert_close(part.apply(weight[start:stop].clone(), 1.0), whole[start:stop])


def test_alpha_of_an_sd_scripts_oft_is_a_bound() -> None:
    kind, blocks = algorithms()["kohya-oft"], draw(4, 4, 4)
    weight = draw(ROWS, INPUTS)
    still = kind.decode({"blocks": blocks}, kind.facts({"blocks": (4, 4, 4)}, Stated(0.0)))
    torch.testing.assert_close(still.apply(weight.clone(), 1.0), weight)
    with pytest.raises(NotRepresentable, match="none"):
        kind.facts({"blocks": (4, 4, 4)})


def test_a_batch_may_hold_factors_of_rows_and_of_columns() -> None:
    """`on_input` is a value: two square layers of one shape may differ in it."""
    kind, weight = algorithms()["ia3"], draw(2, 8)
    stack = kind.decode(
        {"weight": weight, "on_input": torch.tensor([0, 1])},
        kind.facts({"weight": (8,), "on_input": ()}),
    )
    square = draw(8, 8)
    two = stack.apply(torch.stack([square, square]), 0.5)
    torch.testing.assert_close(two[0], square * (1 + 0.5 * weight[0])[:, None])
    torch.testing.assert_close(two[1], square * (1 + 0.5 * weight[1]))


def test_a_peft_factor_of_a_convolution_needs_its_configuration() -> None:
    kind, shapes = algorithms()["ia3"], {"factor": (1, 8, 1, 1)}
    with pytest.raises(NotRepresentable, match="feedforward_modules"):
        kind.settled(kind.facts(shapes), Wanted(None, shapes, lambda _: False))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("role", ["magnitude", "vector"])
def test_magnitudes_of_a_batch_of_square_layers(count: int, role: str) -> None:
    """`[n]`, stacked, is no `[1, n]`: the axis is that of one member."""
    kind, n = algorithms()["lora+dora"], 8
    one = {"up": draw(n, 2), "down": draw(2, n), role: draw(n).abs() + 0.5}
    facts = kind.facts({name: tuple(t.shape) for name, t in one.items()}, Stated(2.0))
    stack = kind.decode({name: torch.stack([t] * count) for name, t in one.items()}, facts)
    weight = draw(n, n, seed=5)
    exact = oracle.dora(weight.numpy(), (one["up"] @ one["down"]).numpy(), one[role].numpy(), 0)
    merged = stack.apply(torch.stack([weight] * count), 1.0)
    np.testing.assert_allclose(merged[count - 1].numpy(), exact, rtol=1e-7)
    torch.testing.assert_close(
        stack.member(count - 1).apply(weight.clone(), 1.0), merged[count - 1]
    )


def test_magnitudes_of_a_convolution_whose_factors_are_flat() -> None:
    """LoHa and LoKr do not store the kernel; magnitudes of the inputs tell it where no table does."""
    kind = algorithms()["loha+dora"]
    stored = {"w1_a": draw(6, 2), "w1_b": draw(2, 36), "w2_a": draw(6, 2), "w2_b": draw(2, 36)}
    m = draw(1, 4, 1, 1).abs() + 0.5
    facts = kind.facts({name: tuple(t.shape) for name, t in {**stored, "magnitude": m}.items()})
    assert facts.kernel is None
    weight = draw(6, 4, 3, 3)
    delta = (stored["w1_a"] @ stored["w1_b"]) * (stored["w2_a"] @ stored["w2_b"])
    merged = kind.decode({**stored, "magnitude": m}, facts).apply(
        weight.reshape(6, -1).clone(), 1.0
    )
    exact = oracle.dora(weight.numpy(), delta.reshape(6, 4, 3, 3).numpy(), m.numpy().reshape(-1), 1)
    np.testing.assert_allclose(merged.numpy(), exact.reshape(6, -1), rtol=1e-7)


@pytest.mark.parametrize("changed", ["a1", "a2", "b2", "scale"])
def test_gloras_that_differ_in_anything_but_rows_are_not_fused(changed: str) -> None:
    one = by_name("glora-()")
    other = replace(one, **{changed: getattr(one, changed) * 2})
    with pytest.raises(NotRepresentable, match="differently"):
        type(one).fuse([one, other])


@pytest.mark.parametrize("blocks", [(4, 2, 32, 32), (2, 6, 3, 3), (3, 6, 4, 4)])
def test_butterfly_stages_that_do_not_fit_the_rows_are_refused(blocks: tuple[int, ...]) -> None:
    """The last of m stages pairs halves of blocks 2ᵐ⁻¹ apart: those must be there, and be halves."""
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        algorithms()["boft"].facts({"blocks": blocks})
