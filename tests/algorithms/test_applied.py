"""Kinds that only PEFT or LyCORIS writes, against float64 formulas from the papers and sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from adaptkit.algorithms._exchanged import Exchanged
from adaptkit.algorithms._settings import Unsettled, Wanted
from adaptkit.algorithms.contract import Facts, Stated, Weights
from adaptkit.errors import NotRepresentable, ShapeMismatch
from adaptkit.keymap import algorithms
from adaptkit.keymap.kinds import applied, changed
from adaptkit.linalg import precision

ROWS, INPUTS = 12, 8
Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """Stored tensors, the settings of the configuration, and W' of W as the formula has it."""

    name: str
    kind: str
    tensors: dict[str, torch.Tensor]
    merged: Callable[[Array, Mapping[str, Array]], Array]
    alpha: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    linear: bool = True  # in the strength


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + sum(shape))
    return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def reflections(w: Array, u: Array, *, orthogonal: bool) -> Array:
    turned = w.copy()
    known: list[Array] = []
    for n in range(u.shape[1]):
        unit = u[:, n].copy()
        for other in known if orthogonal else ():
            unit -= (other @ unit) * other
        unit /= np.linalg.norm(unit)
        known.append(unit)
        turned = turned @ (np.eye(len(unit)) - 2 * np.outer(unit, unit))
    return turned


def blocks(w: Array, block: Array) -> Array:
    out = w.copy()
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            out[o, i] += block[i % block.shape[0], o % block.shape[1]]
    return out


def bat(w: Array, block: Array) -> Array:
    out, r = w.copy(), block.shape[-1]
    for o in range(w.shape[0] // r):
        for i in range(w.shape[1] // r):
            piece = w[o * r : o * r + r, i * r : i * r + r]
            out[o * r : o * r + r, i * r : i * r + r] += piece @ block[o] + block[o]
    return out


def fourier(w: Array, values: Array, seed: int, scale: float) -> Array:
    """The sum of cosines that the inverse transform is, term by term."""
    (m, n), out = w.shape, w.copy()
    places = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[: len(values)]
    o, i = np.arange(m)[:, None], np.arange(n)[None]
    for place, value in zip(places.tolist(), values, strict=True):
        angle = 2 * np.pi * (place // n * o / m + place % n * i / n)
        out += scale * value * np.cos(angle) / (m * n)
    return out


def delora(w: Array, t: Mapping[str, Array]) -> Array:
    out, r = w.copy(), t["down"].shape[0]
    for n in range(r):
        a, b = t["down"][n], t["up"][:, n]
        size = np.linalg.norm(a) * np.linalg.norm(b)
        out += float(t["bound"][0]) / r / size * np.outer(b, a * t["norms"])
    return out


def tlora(w: Array, t: Mapping[str, Array], scale: float) -> Array:
    u, s, v = np.linalg.svd(w)
    rank = t["values"].size
    start = sum(s[n] * np.outer(u[:, n], v[n]) for n in range(rank))
    return w + scale * (t["up"] @ np.diag(t["values"].ravel()) @ t["down"] - start)


def adalora(w: Array, t: Mapping[str, Array], scale: float) -> Array:
    return w + scale * t["up"] @ np.diag(t["values"].ravel()) @ t["down"]


def vera(w: Array, t: Mapping[str, Array]) -> Array:
    right = t["inner"][:, None] * t["right"][:, : w.shape[1]]
    return w + (t["rows"][:, None] * t["left"][: w.shape[0]]) @ right


def sparse(w: Array, places: Array, values: Array, scale: float = 1.0) -> Array:
    out = w.copy()
    for place, value in zip(places.tolist(), values, strict=True):
        out[place // w.shape[1], place % w.shape[1]] += scale * value
    return out


def gralora(w: Array, t: Mapping[str, Array], scale: float) -> Array:
    """Block by block: its own part of the ranks of its row of blocks, and of its column."""
    out, (k, n, r), m = w.copy(), t["ins"].shape, t["outs"].shape[2]
    own = r // k
    for i in range(k):
        for j in range(k):
            right = t["ins"][j, :, i * own : (i + 1) * own]
            left = t["outs"][i, j * own : (j + 1) * own]
            out[i * m : (i + 1) * m, j * n : (j + 1) * n] += scale * (right @ left).T
    return out + scale * t["up"] @ t["down"] if "up" in t else out


def road(w: Array, t: Mapping[str, Array], variant: int, group: int) -> Array:
    out, half = np.zeros_like(w), group // 2
    for a in range(len(w)):
        first = a % group < half
        b = a + half if first else a - half
        if variant == 1:
            cos = sin = a // group * half + a % half
        elif variant == 2:
            cos = sin = a
        else:
            cos, sin = (
                a // group * 2 * group + a % group,
                a // group * 2 * group + group + a % group,
            )
        angles, sizes = t["angles"], t["sizes"]
        out[a] = sizes[cos] * np.cos(angles[cos]) * w[a]
        out[a] += (-1 if first else 1) * sizes[sin] * np.sin(angles[sin]) * w[b]
    return out


DB2 = np.array([1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5]) / 32**0.5  # in closed form


def wavelet(w: Array, values: Array, seed: int, scale: float) -> Array:
    """The sum of shifted products of the two filters of db2, entry by entry."""
    places = torch.randperm(w.size, generator=torch.Generator().manual_seed(seed))[: len(values)]
    high = DB2[::-1] * np.array([1, -1, 1, -1])
    tall, wide = (size + 2 + size % 2 for size in w.shape)
    whole = np.zeros((tall + 2, wide + 2))
    for place, value in zip(places.tolist(), values, strict=True):
        o, i = place // w.shape[1] + (tall - w.shape[0]) // 2, place % w.shape[1] + 1
        rows = DB2 if i < wide // 2 else high  # the quarter on the right is high along the rows
        columns = DB2 if o < tall // 2 else high
        y, x = 2 * (o % (tall // 2)), 2 * (i % (wide // 2))
        whole[y : y + 4, x : x + 4] += value * np.outer(rows, columns)
    cut = whole[2:tall, 2:wide]
    top, left = ((a - b) // 2 for a, b in zip(cut.shape, w.shape, strict=True))
    return w + scale * cut[top : top + w.shape[0], left : left + w.shape[1]]


def circulant(w: Array, kernels: Array) -> Array:
    out, b = w.copy(), kernels.shape[-1]
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            out[o, i] += kernels[o // b, i // b, (i % b - o % b) % b] / w.shape[1]
    return out


def replaced(w: Array, t: Mapping[str, Array]) -> Array:
    u, s, v = np.linalg.svd(w, full_matrices=False)
    kept = min(w.shape) - len(t["values"])
    return (u[:, :kept] * s[:kept]) @ v[:kept] + (t["left"] * t["values"]) @ t["right"]


def deft(w: Array, t: Mapping[str, Array], scale: float, orthogonal: bool) -> Array:
    left = np.linalg.qr(t["directions"])[0] if orthogonal else t["directions"]
    right = left if orthogonal else np.maximum(left, 0)
    return w + left @ (scale * t.get("added", 0) - right.T @ w)


def randlora(w: Array, t: Mapping[str, Array], scale: float) -> Array:
    out, (r, k) = w.copy(), t["within"].shape
    small, large = sorted(w.shape)
    left = t["left"][:large, :k].reshape(large, k * r)
    right = [
        t["within"][q, b] * t["right"][q, 0, :small] * t["along"][b]
        for q in range(r)
        for b in range(k)
    ]
    product = left @ np.array(right)
    return out + scale * (product if w.shape[1] == small else product.T)


def psoft(w: Array, t: Mapping[str, Array]) -> Array:
    u, s, v = (one.double().numpy() for one in torch.linalg.svd(torch.tensor(w).float(), False))
    r = len(t["outs"])
    skew = np.zeros((r, r))
    skew[np.triu_indices(r, 1)] = t["turn"]
    skew -= skew.T
    turn = np.diag(t["outs"]) @ (np.eye(r) + skew) @ np.linalg.inv(np.eye(r) - skew)
    return w + u[:, :r] @ np.diag(s[:r]) @ (turn - np.eye(r)) @ v[:r]


def mixed(logits: Array, bank: Array, most: int) -> Array:
    found = np.zeros((*logits.shape[:2], bank.shape[1]))
    for place in np.ndindex(*logits.shape[:2]):
        best = np.argsort(-logits[place])[:most]
        weights = np.exp(logits[place][best])
        found[place] = (weights / weights.sum()) @ bank[best]
    return found


def vblora(w: Array, t: Mapping[str, Array]) -> Array:
    right, left = (mixed(t[side], t["bank"], 2) for side in ("down", "up"))
    for i in range(left.shape[0]):
        for j in range(right.shape[1]):
            n = t["bank"].shape[1]
            piece = sum(np.outer(left[i, q], right[q, j]) for q in range(len(right)))
            w = w.copy()
            w[i * n : (i + 1) * n, j * n : (j + 1) * n] += piece
    return w


def whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


WHERE = torch.randperm(ROWS * INPUTS, generator=torch.Generator().manual_seed(4))[:17]
CASES = [
    Case("shira", "shira", {"entries": draw(17), "where": torch.stack([WHERE // INPUTS, WHERE % INPUTS]).int()},
         lambda w, t: sparse(w, WHERE, t["entries"])),
    Case("supertuning", "supertuning",
         {"entries": draw(17), "where": WHERE.int(), "up": draw(ROWS, 2), "down": draw(2, INPUTS)},
         lambda w, t: sparse(w, WHERE, t["entries"]) + 1.5 * t["up"] @ t["down"], config={"lora_alpha": 3}),
    Case("waveft-plain", "waveft", {"entries": draw(17)},
         lambda w, t: sparse(w, torch.randperm(w.size, generator=torch.Generator().manual_seed(9))[:17], t["entries"], 3.0),
         config={"random_loc_seed": 9, "scaling": 3, "use_idwt": False}),
    Case("waveft-db2", "waveft", {"entries": draw(17)}, lambda w, t: wavelet(w, t["entries"], 9, 3.0),
         config={"random_loc_seed": 9, "scaling": 3, "wavelet_family": "db2"}),
    Case("gralora", "gralora", {"ins": draw(2, 4, 6), "outs": draw(2, 6, 6)},
         lambda w, t: gralora(w, t, 0.5), config={"alpha": 3}),
    Case("gralora-hybrid", "gralora",
         {"ins": draw(4, 2, 4), "outs": draw(4, 4, 3), "up": draw(ROWS, 2), "down": draw(2, INPUTS)},
         lambda w, t: gralora(w, t, 0.5), config={"alpha": 3}),
    *(Case(f"road-{n}", "road", {"angles": draw(6 * n), "sizes": draw(6 * n, seed=2)},
           lambda w, t, n=n: road(w, t, n, 4), config={"variant": f"road_{n}", "group_size": 4})
      for n in (1, 2, 4)),
    Case("c3a", "c3a", {"kernels": draw(3, 2, 4)}, lambda w, t: circulant(w, t["kernels"])),
    Case("osf", "osf", {"left": draw(ROWS, 3), "values": draw(3), "right": draw(3, INPUTS)}, replaced),
    *(Case(f"deft-{n}", "deft", {"directions": draw(ROWS, 3), "added": draw(3, INPUTS)},
           lambda w, t, n=n: deft(w, t, 2 / 3, n == "qr"), config={"decomposition_method": n, "alpha": 2})
      for n in ("relu", "qr")),
    Case("para", "deft", {"directions": draw(ROWS, 3)}, lambda w, t: deft(w, t, 1.0, True),
         config={"decomposition_method": "qr"}),
    Case("randlora", "randlora",
         {"within": draw(3, 3), "along": draw(3, INPUTS), "left": draw(16, 5, 3), "right": draw(3, 1, 9)},
         lambda w, t: randlora(w, t, 2.0), config={"randlora_alpha": 6}),
    Case("psoft", "psoft", {"turn": draw(6), "outs": draw(4), "ins": torch.ones(4, dtype=torch.float64)}, psoft,
         config={}),
    Case("vblora", "vblora", {"bank": draw(7, 2), "down": draw(3, 4, 7), "up": draw(6, 3, 7)}, vblora, config={}),
    Case("unilora", "unilora",
         {"bank": draw(9), "ups": whole(9, ROWS, 2), "downs": whole(9, 2, INPUTS),
          "up_scales": draw(ROWS, 2), "down_scales": draw(2, INPUTS)},
         lambda w, t: w + (t["bank"][t["ups"]] * t["up_scales"]) @ (t["bank"][t["downs"]] * t["down_scales"])),
    Case("hira", "hira", {"up": draw(ROWS, 3), "down": draw(3, INPUTS)},
         lambda w, t: w * (1 + t["up"] @ t["down"])),
    *(Case(f"hra-{orthogonal}", "hra", {"vectors": draw(INPUTS, 4)},
           lambda w, t, o=orthogonal: reflections(w, t["vectors"], orthogonal=o),
           config={"apply_GS": orthogonal}) for orthogonal in (False, True)),
    *(Case(f"miss-{r}-{m}", "miss", {"block": draw(r, m)}, lambda w, t: blocks(w, t["block"]),
           config={"init_weights": "mini" if m < ROWS else True})
      for r, m in ((3, ROWS), (4, ROWS), (ROWS, ROWS), (5, 4))),
    Case("miss-bat", "miss", {"block": draw(3, 4, 4)}, lambda w, t: bat(w, t["block"])),
    Case("fourierft", "fourierft", {"coefficients": draw(17)},
         lambda w, t: fourier(w, t["coefficients"], 9, 30.0),
         config={"random_loc_seed": 9, "scaling": 30}),
    Case("vera", "vera", {"rows": draw(ROWS), "inner": draw(3), "left": draw(16, 3), "right": draw(3, 9)},
         vera),
    Case("delora", "delora", {"up": draw(ROWS, 3), "down": draw(3, INPUTS), "bound": draw(1) + 3,
                              "norms": draw(INPUTS).abs()}, delora),
    Case("adalora", "adalora", {"up": draw(ROWS, 3), "down": draw(3, INPUTS), "values": draw(3, 1)},
         lambda w, t: adalora(w, t, 6 / (5 + 1e-5)), 6, {"init_r": 5}),
    Case("adalora-negative", "adalora", {"up": draw(ROWS, 3), "down": draw(3, INPUTS), "values": draw(3, 1)},
         lambda w, t: adalora(w, t, 5 / (5 + 1e-5)), -1, {"init_r": 5}),
    Case("tlora", "tlora", {"up": draw(ROWS, 3), "down": draw(3, INPUTS), "values": draw(1, 3)},
         lambda w, t: tlora(w, t, 2.0), 6),
    Case("glora", "peft-glora", {"ad": draw(ROWS, 2), "au": draw(2, INPUTS), "bd": draw(ROWS, 2, seed=1),
                                 "bu": draw(2, INPUTS, seed=1), "cz": draw(INPUTS, 1), "dz": draw(ROWS),
                                 "ez": draw(ROWS)},
         lambda w, t: w * (1 + t["ad"] @ t["au"]) + t["bd"] @ t["bu"]),
    Case("glora-column", "peft-glora", {"ax": draw(ROWS, 1), "bx": draw(ROWS, 1, seed=1), "cz": draw(INPUTS, 1),
                                        "dz": draw(ROWS), "ez": draw(ROWS)},
         lambda w, t: w * (1 + t["ax"]) + t["bx"]),
    Case("glora-number", "peft-glora", {"ax": draw(1), "bx": draw(1, seed=1), "cz": draw(INPUTS, 1),
                                        "dz": draw(ROWS), "ez": draw(ROWS)},
         lambda w, t: w * (1 + t["ax"][0]) + t["bx"][0]),
]  # fmt: skip


def facts(case: Case) -> Facts:
    kind = algorithms()[case.kind]
    shapes = {role: tuple(tensor.shape) for role, tensor in case.tensors.items()}
    assert frozenset(shapes) - set(kind.shared) in kind.forms
    found = kind.facts(shapes, None if case.alpha is None else Stated(case.alpha))
    found = kind.settled(found, Wanted(case.config, shapes, lambda _: False))
    assert found.rows in (0, ROWS)
    assert found.columns in (0, INPUTS)
    return found


def opened(case: Case, tensors: Mapping[str, torch.Tensor] | None = None) -> Weights:
    return algorithms()[case.kind].decode(tensors or case.tensors, facts(case))


def base() -> torch.Tensor:
    return draw(ROWS, INPUTS, seed=7)


def exact(case: Case, weight: torch.Tensor) -> Array:
    return case.merged(weight.numpy(), {role: one.numpy() for role, one in case.tensors.items()})


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def check(case: Case, found: torch.Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), exact(case, base()), rtol=1e-11, atol=1e-11)


def test_the_merged_weight_is_the_formulas(case: Case) -> None:
    check(case, opened(case).apply(base(), 1.0))


def test_planted_faults_are_noticed(case: Case) -> None:
    right = opened(case).apply(base(), 1.0)
    near = opened(case).apply(base(), 1 - 1e-6)
    for wrong in (base(), near, right.float().double(), right.roll(1, 0), right.roll(1, 1)):
        with pytest.raises(AssertionError):
            check(case, wrong)


def test_a_batch_is_its_members(case: Case) -> None:
    """Two layers of one shape are applied at once; numbers that all share are in both."""
    factors = [1.0, 0.9]
    stack = {
        role: torch.stack([tensor * f if tensor.is_floating_point() else tensor for f in factors])
        for role, tensor in case.tensors.items()
    }
    two = opened(case, stack).apply(torch.stack([base(), base() * 1.1]), 0.7)
    for n, one in enumerate((base(), base() * 1.1)):
        member = opened(case, {role: tensor[n] for role, tensor in stack.items()})
        torch.testing.assert_close(two[n], member.apply(one, 0.7))


def test_strength_goes_from_the_base_to_the_merged_weight(case: Case) -> None:
    before, after = base(), opened(case).apply(base(), 1.0)
    torch.testing.assert_close(opened(case).apply(base(), 0.0), before)
    torch.testing.assert_close(opened(case).apply(base(), 0.5), (before + after) / 2)


# their rows are none of the same kind, or not known
UNCUT = {
    "miss", "fourierft", "tlora", "peft-glora", "shira", "supertuning", "waveft", "gralora", "c3a",
    "osf", "deft", "randlora", "psoft", "vblora",
}  # fmt: skip


def test_rows_are_cut_and_exchanged_exactly_or_not_at_all(case: Case) -> None:
    whole, weights = opened(case).apply(base(), 1.0), opened(case)
    try:
        found = weights.part(4, 8).apply(base()[4:8].clone(), 1.0)
    except NotRepresentable:
        assert case.kind in UNCUT
    else:
        torch.testing.assert_close(found, whole[4:8])
    try:
        swapped = weights.swapped().apply(base().roll(ROWS // 2, 0), 1.0)
    except NotRepresentable:
        assert case.kind in (UNCUT - {"tlora"}) | {"road"}
    else:
        torch.testing.assert_close(swapped.roll(ROWS // 2, 0), whole)


def test_halves_are_exchanged_for_every_kind(case: Case) -> None:
    """Also of a stack; twice is the same again, in the memory of the weight."""
    whole, weights = opened(case).apply(base(), 1.0), Exchanged(opened(case))
    given = base().roll(ROWS // 2, 0)
    torch.testing.assert_close(weights.apply(given, 1.0).roll(ROWS // 2, 0), whole)
    assert weights.swapped() is weights.inner
    if case.kind != "tlora" and weights.additive:
        delta = (whole - base()).roll(ROWS // 2, 0)
        torch.testing.assert_close(weights.delta(), delta)
        torch.testing.assert_close(weights.times(2.0).delta(), 2 * delta)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_blocks_of_rows_are_applied_as_the_whole(
    case: Case, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that neither a second W nor a ΔW is formed; what it makes of W is measured from one wide copy."""
    monkeypatch.setattr(precision, "SCRATCH", 3 * INPUTS)
    weights, whole = opened(case), opened(case).apply(base(), strength)
    for own in (weights, weights.computed()):
        torch.testing.assert_close(applied(own, base(), strength), whole)
    narrow = base().half()
    expected = weights.apply(narrow.double(), strength) - narrow.double()
    before = narrow.clone()
    torch.testing.assert_close(changed(weights, narrow, strength), expected)
    assert torch.equal(narrow, before)


def test_what_needs_a_weight_has_no_difference_alone(case: Case) -> None:
    weights = opened(case)
    if weights.additive:
        torch.testing.assert_close(base() + weights.delta(), weights.apply(base(), 1.0))
        torch.testing.assert_close(weights.times(-2.0).delta(), -2.0 * weights.delta())
    else:
        with pytest.raises(NotRepresentable, match="depends on the weight"):
            weights.delta()


def test_what_is_stored_is_what_was_read(case: Case) -> None:
    """Except of T-LoRA, which is not written; multiplied weights are those of a multiplied ΔW."""
    weights, kind = opened(case), algorithms()[case.kind]
    if case.kind == "tlora":
        with pytest.raises(NotRepresentable, match="read, not written"):
            weights.encode()
        return
    stored = weights.encode()
    assert {role: tensor.shape for role, tensor in stored.items()} == {
        role: tensor.shape for role, tensor in case.tensors.items()
    }
    assert all(torch.equal(stored[role], case.tensors[role]) for role in stored)
    if case.kind == "vblora":
        with pytest.raises(NotRepresentable, match="add up to 1"):
            weights.times(0.3).encode()
    elif kind.linear or kind.additive:
        scaled = opened(case, weights.times(0.3).encode()).apply(base(), 1.0)
        torch.testing.assert_close(scaled, weights.apply(base(), 0.3))
    else:
        with pytest.raises(NotRepresentable):
            weights.times(0.3)


@pytest.mark.parametrize("name", ["hra-False", "fourierft", "adalora"])
def test_a_kind_that_needs_settings_is_refused_without(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(Unsettled, match=r"adapter_config\.json") as refused:
        facts(replace(case, config=None))  # type: ignore[arg-type]
    assert "name the folder" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("adalora", {"up": (4, 2), "down": (2, 4), "values": (3, 1)}),
        ("delora", {"up": (4, 2), "down": (2, 5), "bound": (1,), "norms": (4,)}),
        ("hira", {"up": (4, 2, 3, 3), "down": (2, 5, 3, 3)}),
        ("hra", {"vectors": (2, 3)}),
        ("miss", {"block": (2, 3, 4)}),
        ("vera", {"rows": (9,), "inner": (2,), "left": (8, 2), "right": (2, 5)}),
        ("vera", {"rows": (4,), "inner": (2,), "left": (8, 2)}),
        ("tlora", {"up": (4, 2, 3, 3), "down": (2, 4, 3, 3), "values": (1, 2)}),
        ("peft-glora", {"ad": (4, 2), "au": (3, 5), "bd": (4, 2), "bu": (2, 5)}),
        ("peft-glora", {"ad": (4, 2), "au": (2, 5), "bd": (6, 2), "bu": (2, 5)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        algorithms()[kind].facts(shapes)


@pytest.mark.parametrize("name", ["miss-5-4", "miss-bat", "vera", "hra-False", "fourierft"])
def test_a_weight_of_another_size_is_refused(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    sizes = {"fourierft": (2, 2), "vera": (ROWS, 11)}.get(name, (ROWS + 1, INPUTS + 1))
    with pytest.raises(ShapeMismatch, match="does not fit"):
        opened(case).apply(torch.zeros(*sizes, dtype=torch.float64), 1.0)
