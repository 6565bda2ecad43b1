"""Recognising Kronecker products in differences of rounded weights; oracles in float64 NumPy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pytest
import torch

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg.kron import blocks
from adaptkit.linalg.kron import scan as module
from adaptkit.linalg.kron.nearest import nearest_kron
from adaptkit.linalg.kron.scan import FACTORS, Split, scan_kron, second_noise, second_rank, splits
from adaptkit.linalg.noise import RoundingNoise, rounding_noise, vote
from tests import oracle
from tests.linalg.test_noise import (
    HALF,
    SHAPES,
    Merged,
    energy,
    finetunes,
    generator,
    loras,
    low_rank,
    merged,
    variance,
    weight,
)

Array = np.ndarray
LOKR_FACTORS = (2, 4, 8, 16)


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(generator("tensor", *shape).standard_normal(shape))


def rows_of_blocks(x: Array, a: int, b: int) -> Array:
    """R(X), block by block."""
    c, d = x.shape[0] // a, x.shape[1] // b
    return np.stack(
        [x[i * c : i * c + c, j * d : j * d + d].ravel() for i in range(a) for j in range(b)]
    )


def leading(x: Array, a: int, b: int) -> float:
    """The energy that the nearest product captures."""
    return float(np.linalg.svd(rows_of_blocks(x, a, b), compute_uv=False)[0] ** 2)


def cut(m: int, n: int, window: int, factor: int) -> tuple[int, int, int, int]:
    (a, c), (b, d) = oracle.factorization(m, factor), oracle.factorization(n // window, factor)
    return a, b, c, d * window


def lokr(random: np.random.Generator, way: tuple[int, int, int, int], rank: int = 0) -> Array:
    """w1 ⊗ w2 of random factors, w2 full for rank 0."""
    a, b, c, d = way
    second = low_rank(random, c, d, rank) if rank else random.standard_normal((c, d))
    return np.kron(random.standard_normal((a, b)), second)


def lokrs(
    strengths: tuple[float, ...], ranks: tuple[int, ...], dtypes: Sequence[torch.dtype] = HALF
) -> Iterator[tuple[tuple[object, ...], Merged]]:
    for (m, n), window in SHAPES.items():
        for factor in LOKR_FACTORS:
            for rank in ranks:
                random = generator("lokr", m, n, factor, rank)
                base, change = weight(random, m, n), lokr(random, cut(m, n, window, factor), rank)
                for dtype in dtypes:
                    for ulp in strengths:
                        yield (m, n, dtype, factor, rank, ulp), merged(base, change, ulp, dtype)


def unavoidable(one: Merged, w1: Array, w2: Array) -> float:
    """The energy of that part of the rounding which small changes of w1 and w2 look like: no fit can tell it apart."""
    rounding = rows_of_blocks(one.delta.double().numpy() - one.truth, *w1.shape)
    first, second = (w.ravel() / np.linalg.norm(w) for w in (w1, w2))
    return (
        energy(first @ rounding) + energy(rounding @ second) - float(first @ rounding @ second) ** 2
    )


def recognised(one: Merged, window: int = 1, *, aided: bool = True) -> Split | None:
    scan = scan_kron(one.delta, window)
    which = int(scan.recognised(one.noise.floor if aided else None))
    return scan.splits[which] if which >= 0 else None


# populations -----------------------------------------------------------------------------------------------------


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", HALF)
def test_merged_lokrs_are_recognised_and_recovered_to_the_floor(dtype: torch.dtype) -> None:
    """By the factor in 99 of 100, down to where three entries in four are rounded away; the rank of w2 from 4 ulp on."""
    wrong: list[object] = []
    wrong_ranks: list[object] = []
    floors: list[float] = []
    of = ranked = 0
    for name, one in lokrs((0.3, 4, 20), (0, 1, 6), [dtype]):
        m, n, _, factor, rank, ulp = name
        a, b, *_ = way = cut(m, n, SHAPES[m, n], factor)
        found = recognised(one, SHAPES[m, n])
        of += 1
        if (
            found is None
            or (found.a, found.b, found.c, found.d) != way
            or factor not in found.factors
        ):
            wrong.append((name, found))
        if ulp < 4:
            continue
        second = second_rank(one.delta, one.noise, a, b)
        ranked += rank > 0
        if rank and int(second.rank) != rank:
            wrong_ranks.append((name, int(second.rank)))
        assert rank or not bool(second.low_rank), name
        best = nearest_kron(one.delta, a, b)
        w1, w2 = best.w1.double().numpy(), best.w2.double().numpy()
        error = energy(np.kron(w1, w2) - one.truth)
        assert error <= 1.02 * unavoidable(one, w1, w2), name
        if (
            ulp == 20 and rank != 1
        ):  # below, and for rank 1, rounding on a grid depends on the change
            floors.append(error / ((w1.size + w2.size) / (m * n) * one.floor))
    assert (of, ranked) == (144, 64)
    assert len(wrong) <= 1, wrong
    assert not wrong_ranks
    assert 0.9 < np.median(floors) < 1.15


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", HALF)
def test_nothing_else_is_called_a_lokr(dtype: torch.dtype) -> None:
    """With what is known of the rounding and without."""
    called, of = [], 0
    others = ((name, one) for name, _, one in loras([dtype]))
    for name, one in chain(others, finetunes(dtypes=[dtype])):
        scan = scan_kron(one.delta, SHAPES[name[:2]])
        of += 1
        called += [name for floor in (None, one.noise.floor) if int(scan.recognised(floor)) >= 0]
    assert of == 84 + 84
    assert not called


def test_the_second_factors_rank_by_vote_where_the_change_is_weak() -> None:
    ranks: dict[object, list[int]] = defaultdict(list)
    for (m, n, dtype, factor, rank, ulp), one in lokrs((1, 2), (2, 4, 8)):
        if factor < 16:
            a, b, _, _ = cut(m, n, SHAPES[m, n], factor)
            ranks[dtype, rank, ulp].append(int(second_rank(one.delta, one.noise, a, b).rank))
    for (_, rank, _), found in ranks.items():
        assert vote(found).value == rank, (rank, found)


@pytest.mark.parametrize("factor", [3, 5, 10, 12, 20, -1])
def test_other_factors(factor: int) -> None:
    for m, n, window in ((240, 360, 1), (360, 480 * 9, 9), (128, 320, 1)):
        random = generator("factor", factor, m, n)
        way = next(way for way in splits(m, n, window) if factor in way.factors)
        change = lokr(random, (way.a, way.b, way.c, way.d), 3)
        assert recognised(merged(weight(random, m, n), change, 4, torch.bfloat16), window) == way


def test_resemblance_is_no_product() -> None:
    """A mean of all entries is a product by every split, of most of the energy: the rounding tells that it is not all."""
    random = generator("mean")
    base = weight(random, 320, 400)
    for change in (
        1 + 0.3 * random.standard_normal((320, 400)),
        (1 + 0.3 * random.standard_normal((320, 1))) @ (1 + 0.3 * random.standard_normal((1, 400))),
        lokr(random, (8, 8, 40, 50)) + 0.2 * random.standard_normal((320, 400)),
    ):
        one = merged(base, change, 20, torch.bfloat16)
        assert recognised(one, aided=False) is not None
        assert recognised(one) is None


def test_what_changed_in_one_block_only_is_no_product() -> None:
    random = generator("block")
    change = np.zeros((320, 400))
    change[160:, :200] = random.standard_normal((160, 200))
    one = merged(weight(random, 320, 400), change, 5, torch.bfloat16)
    scan = scan_kron(one.delta)
    assert float(scan.captured.max() / scan.total) > 0.99
    assert float(scan.score.max()) < 0.1


def test_products_merged_in_half_precision_and_over_a_rounded_base() -> None:
    random = generator("other noise")
    change, base = lokr(random, (8, 8, 40, 50)), weight(random, 320, 400)
    both = merged(base, change, 20, torch.bfloat16, "both")
    scan = scan_kron(both.delta)
    assert scan.splits[int(scan.recognised(rounding_noise(both.rounded[0]).floor))].a == 8
    half = torch.from_numpy(base).float()
    tuned = half + torch.from_numpy(0.001 * change).half().float()
    scan = scan_kron(tuned - half)
    assert scan.splits[int(scan.recognised(rounding_noise(tuned).floor))].a == 8


# the scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 9])
def test_splits_are_those_of_the_loaders(window: int) -> None:
    for m, n in ((320, 640), (48, 7), (97, 101), (1, 30), (1280, 320)):
        found = splits(m, n * window, window)
        expected: dict[tuple[int, int, int, int], list[int]] = {}
        for factor in FACTORS:
            expected.setdefault(
                cut(m, n * window, window, factor if factor > 0 else 10**6), []
            ).append(factor)
        whole = {
            way: who for way, who in expected.items() if way[0] * way[1] > 1 and way[2] * way[3] > 1
        }
        assert {(way.a, way.b, way.c, way.d): list(way.factors) for way in found} == whole
        assert all(way.parameters == way.a * way.b + way.c * way.d for way in found)
    with pytest.raises(ShapeMismatch, match="30 columns are not a multiple of the window 9"):
        splits(10, 30, 9)


@pytest.mark.parametrize(
    ("m", "n", "window"), [(48, 80, 1), (60, 36 * 9, 9), (1, 64, 1), (90, 2, 1), (7, 11, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_captured_is_the_leading_singular_value(
    m: int, n: int, window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tensor(m, n).to(dtype)
    tol = 1e-12 if dtype == torch.float64 else 3e-7
    exact = x.double().numpy()
    for pieces in (1 << 13, 40):
        monkeypatch.setattr(blocks, "RUN", pieces)
        scan = scan_kron(x, window)
        assert float(scan.total) == pytest.approx(energy(exact), rel=tol, abs=0)
        for way, captured, score in zip(scan.splits, scan.captured, scan.score, strict=True):
            best = leading(exact, way.a, way.b)
            assert float(captured) == pytest.approx(best, rel=0, abs=tol * energy(exact)), way
            chance = min(1.0, ((way.a * way.b) ** 0.5 + (way.c * way.d) ** 0.5) ** 2 / (m * n))
            block = (rows_of_blocks(exact, way.a, way.b) ** 2).sum(1).max() / energy(exact)
            least = min(
                (best / energy(exact) - chance) / (1 - chance) if chance < 1 else 0.0,
                2 * (best / energy(exact) - block) / (1 - block),
            )
            assert float(score) == pytest.approx(least, abs=100 * tol), way


@pytest.mark.parametrize("kind", ["noise", "product", "rounded", "noisy", "power"])
def test_lanczos_captures_what_the_gram_matrix_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 256 blocks. White noise is the worst case; of a product, what remains must be told from rounding."""
    random = generator("lanczos", kind)
    product = lokr(random, (15, 20, 24, 24))
    x = {
        "noise": random.standard_normal((360, 480)),
        "product": product,
        "noisy": product + 0.3 * random.standard_normal((360, 480)),
        "rounded": product + 1e-4 * random.standard_normal((360, 480)),
        "power": low_rank(random, 360, 480, 3) + random.standard_normal((360, 480)),
    }[kind]
    delta = torch.from_numpy(x).float()
    scan = scan_kron(delta, factors=(24, -1))
    monkeypatch.setattr(module, "GRAM_SIDE", 10**6)
    gram = scan_kron(delta, factors=(24, -1))
    assert all(way.a * way.b > 256 for way in scan.splits)
    for way, captured, other in zip(scan.splits, scan.captured, gram.captured, strict=True):
        best = leading(x, way.a, way.b)
        assert float(other) == pytest.approx(best, rel=1e-5, abs=0)
        assert best * 0.99 <= float(captured) <= best + 1e-6 * energy(x)
        if best > 0.5 * energy(x):
            assert best - float(captured) <= 0.01 * (energy(x) - best) + 1e-7 * best


def test_finest_of_equals_is_not_taken_but_the_cheapest() -> None:
    """A product of three is one by two splits: the one with fewer parameters is meant."""
    random = generator("nested")
    change = np.kron(
        random.standard_normal((4, 4)),
        np.kron(random.standard_normal((2, 2)), random.standard_normal((15, 20))),
    )
    scan = scan_kron(torch.from_numpy(change))
    by = {way.a: float(score) for way, score in zip(scan.splits, scan.score, strict=True)}
    assert by[4] == pytest.approx(1.0)
    assert by[8] == pytest.approx(1.0)
    assert scan.splits[int(scan.recognised())].a == 8


def test_zero_batches_strides_and_threads() -> None:
    random = generator("batch")
    members = [
        np.zeros((96, 120)),
        lokr(random, (8, 8, 12, 15)),
        random.standard_normal((96, 120)),
        lokr(random, (4, 4, 24, 30)),
    ]
    x = torch.from_numpy(np.stack(members)).float().reshape(2, 2, 96, 120)
    scan = scan_kron(x)
    assert scan.captured.shape == scan.score.shape == (2, 2, len(scan.splits))
    assert scan.total.dtype == scan.captured.dtype == torch.float64
    assert not scan.captured[0, 0].any()
    assert not scan.score[0, 0].any()
    which = scan.recognised().flatten().tolist()
    assert [scan.splits[i].a if i >= 0 else None for i in which] == [None, 8, None, 4]
    assert torch.equal(scan.recognised(torch.zeros(2, 2)), scan.recognised())
    for i, member in enumerate(x.flatten(0, 1)):
        assert torch.equal(scan_kron(member).captured, scan.captured.flatten(0, 1)[i])
    turned = scan_kron(x.mT.contiguous().mT)
    torch.testing.assert_close(turned.captured, scan.captured, rtol=1e-6, atol=1e-9)
    assert scan_kron(x[:0]).recognised().shape == (0, 2)
    try:
        torch.set_num_threads(2)
        again = scan_kron(x)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again.recognised(), scan.recognised())
    torch.testing.assert_close(again.captured, scan.captured, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7)])
def test_shapes_without_a_split(shape: tuple[int, int]) -> None:
    scan = scan_kron(torch.ones(shape))
    assert scan.splits == ()
    assert int(scan.recognised()) == -1
    assert int(scan.recognised(scan.total)) == -1


def test_half_precision_input_is_widened() -> None:
    x = tensor(48, 60).half()
    assert torch.equal(scan_kron(x).captured, scan_kron(x.float()).captured)


# the second factor -----------------------------------------------------------------------------------------------


def test_noise_of_the_second_factor_is_that_of_the_weighted_sum() -> None:
    random = generator("second")
    a, b, c, d = 3, 4, 10, 6
    rows, columns = random.uniform(0.1, 2, (2, a * c)), random.uniform(0.1, 2, (2, b * d))
    columns /= columns.mean(1, keepdims=True)
    w1 = random.standard_normal((2, a, b))
    found = second_noise(
        RoundingNoise(torch.from_numpy(rows), torch.from_numpy(columns)), torch.from_numpy(w1)
    )
    for k in range(2):
        variances = rows_of_blocks(np.outer(rows[k], columns[k]), a, b)
        exact = (w1[k].ravel() ** 2 @ variances).reshape(c, d)
        np.testing.assert_allclose(found.rows[k].numpy(), exact.mean(1), rtol=1e-12)
        np.testing.assert_allclose(
            found.columns[k].numpy(), exact.mean(0) / exact.mean(), rtol=1e-12
        )
        assert float(found.floor[k]) == pytest.approx(exact.sum(), rel=1e-6, abs=0)


def test_noise_of_the_second_factor_is_what_rounding_leaves_in_it() -> None:
    random = generator("simulated")
    base, change = weight(random, 320, 400, 0.5), lokr(random, (4, 4, 80, 100))
    one = merged(base, change, 20, torch.bfloat16, "master")
    w1 = nearest_kron(one.delta, 4, 4).w1.double().numpy()
    w1 /= np.linalg.norm(w1)
    error = (w1.ravel() @ rows_of_blocks(one.delta.double().numpy() - one.truth, 4, 4)).reshape(
        80, 100
    )
    found = second_noise(one.noise, torch.from_numpy(w1))
    assert float(found.floor) == pytest.approx(energy(error), rel=0.1, abs=0)
    exact = (w1.ravel() ** 2 @ rows_of_blocks(variance(one.rounded[0]), 4, 4)).sum()
    assert float(found.floor) == pytest.approx(exact, rel=0.02, abs=0)


def test_second_ranks_of_a_batch_and_of_zero() -> None:
    random = generator("second batch")
    members = [
        merged(weight(random, 96, 120), lokr(random, (4, 4, 24, 30), rank), 30, torch.float16)
        for rank in (2, 5)
    ]
    delta = torch.stack([*(one.delta for one in members), torch.zeros(96, 120)])
    tuned = torch.stack([*(one.rounded[0] for one in members), members[0].rounded[0]])
    found = second_rank(delta, rounding_noise(tuned), 4, 4)
    assert found.rank.tolist() == [2, 5, 0]
    assert found.low_rank.tolist() == [True, True, True]


FINE, COARSE, MIDDLE = (
    Split((2,), 2, 2, 30, 40),
    Split((60,), 60, 2, 10, 4),
    Split((4,), 4, 4, 9, 9),
)


def told(*scores: float, captured: Sequence[float] = (), floor: float | None = None) -> int:
    """Which split is recognised of FINE, COARSE and MIDDLE, of 1204, 160 and 97 numbers."""
    scan = module.KronScan(
        (FINE, COARSE, MIDDLE),
        torch.tensor(captured or scores, dtype=torch.float64),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64),
    )
    return int(scan.recognised(None if floor is None else torch.tensor(floor)))


@pytest.mark.parametrize(
    ("scores", "which"),
    [
        ((0.9, 0.2, 0.1), 0),
        ((0.49, 0.2, 0.1), -1),
        ((0.50, 0.2, 0.1), 0),
        # equally good: within a hundredth of what the best lacks to 1
        ((0.9, 0.8991, 0.1), 1),
        ((0.9, 0.8991, 0.8991), 2),
        ((0.9, 0.8989, 0.8), 0),
        ((1.0, 1 - 9e-7, 0.1), 1),
        ((1.0, 1 - 3e-6, 0.1), 0),
        ((1.0, 0.995, 0.995), 0),
    ],
)
def test_of_equally_good_splits_the_one_of_fewest_numbers_is_meant(
    scores: tuple[float, float, float], which: int
) -> None:
    assert told(*scores) == which


@pytest.mark.parametrize(
    ("captured", "floor", "which"),
    [
        ((0.99, 0.999, 0.9), 1e-2, 0),
        ((0.97, 0.999, 0.9), 1e-2, 0),  # leaves three times the rounding
        ((0.95, 0.999, 0.9), 1e-2, 1),  # leaves five times
        ((0.95, 0.9, 0.9), 1e-2, -1),
        ((1 - 9e-6, 0.9, 0.9), 0.0, 0),  # so little is no doubt without any rounding
        ((1 - 2e-5, 0.9, 0.9), 0.0, -1),
    ],
)
def test_what_leaves_more_than_rounding_does_is_no_product(
    captured: tuple[float, float, float], floor: float, which: int
) -> None:
    assert told(0.95, 0.9, 0.85, captured=captured, floor=floor) == which
