"""Rounding noise and the rank above it, on adapters and finetunes rounded to fp16 and bf16; oracles in float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptkit.linalg import noise as module
from adaptkit.linalg.noise import (
    WEAK,
    RoundingNoise,
    denoised,
    rank_above_noise,
    rounding_noise,
    vote,
    zero_share,
)

Array = np.ndarray
HALF = (torch.float16, torch.bfloat16)
SHAPES = {
    (320, 320): 1,
    (640, 768): 1,
    (320, 1280): 1,
    (320, 320 * 9): 9,
}  # and the window of a convolution's kernel
DIGITS = {  # stored digits of the fraction, the exponent of the smallest normal number
    torch.float16: (10, -14),
    torch.bfloat16: (7, -126),
    torch.float32: (23, -126),
    torch.float8_e4m3fn: (3, -6),
    torch.float8_e5m2: (2, -14),
}


def generator(*seed: object) -> np.random.Generator:
    """The same on every run and machine: Python's own hash of text is not."""
    return np.random.default_rng(list(repr(seed).encode()))


def ulps(x: Array, dtype: torch.dtype) -> Array:
    digits, least = DIGITS[dtype]
    return 2.0 ** (
        np.maximum(np.frexp(x)[1] - 1.0, least, where=x != 0, out=np.full(x.shape, float(least)))
        - digits
    )


def variance(tensor: Tensor) -> Array:
    """ulp² / 12 of each entry."""
    return ulps(tensor.double().numpy(), tensor.dtype) ** 2 / 12


def weight(random: np.random.Generator, m: int, n: int, rows: float = 0.0) -> Array:
    """Like a trained layer's; `rows`: the spread of the logarithms of their scales."""
    return 0.02 * random.standard_normal((m, n)) * np.exp(rows * random.standard_normal((m, 1)))


def low_rank(random: np.random.Generator, m: int, n: int, rank: int) -> Array:
    return random.standard_normal((m, rank)) @ random.standard_normal((rank, n))


def power_law(random: np.random.Generator, m: int, n: int, power: float) -> Array:
    """σᵢ ~ i^-power with random singular vectors."""
    small = min(m, n)
    u, v = (np.linalg.qr(random.standard_normal((side, small)))[0] for side in (m, n))
    return (u * np.arange(1, small + 1.0) ** -power) @ v.T


def blocks(random: np.random.Generator, m: int, n: int) -> Array:
    """Heads that changed by different amounts, in different directions."""
    scales = np.exp(random.standard_normal((m // 40, 1)))
    return np.repeat(scales, 40, axis=0) * (
        low_rank(random, m, n, 20) / 20**0.5 + random.standard_normal((m, n))
    )


def finetune(random: np.random.Generator, m: int, n: int, kind: str) -> Array:
    if kind == "white":
        return random.standard_normal((m, n))
    return blocks(random, m, n) if kind == "blocks" else power_law(random, m, n, float(kind))


@dataclass(frozen=True)
class Merged:
    """A weight that a `truth` was added to and rounded: what is left of it, and the files' tensors."""

    truth: Array
    delta: Tensor
    rounded: tuple[Tensor, ...]

    @property
    def noise(self) -> RoundingNoise:
        return rounding_noise(*self.rounded)

    @property
    def floor(self) -> float:
        return float(sum(variance(one).sum() for one in self.rounded))


def merged(
    base: Array, change: Array, ulp: float, dtype: torch.dtype, mode: str = "grid"
) -> Merged:
    """`change` scaled to an rms of `ulp` times that of the ulps of `base`.

    grid: the base was a file of this dtype; master: it is float32; both: it was rounded, and tuned from before that.
    """
    truth = change * (ulp * np.sqrt((ulps(base, dtype) ** 2).mean() / (change**2).mean()))
    if mode == "grid":
        base = torch.from_numpy(base).to(dtype).double().numpy()
    tuned = torch.from_numpy(base + truth).to(dtype)
    before = torch.from_numpy(base).to(dtype) if mode == "both" else torch.from_numpy(base)
    rounded = (tuned, before) if mode == "both" else (tuned,)
    return Merged(truth, (tuned.double() - before.double()).float(), rounded)


def loras(
    dtypes: Sequence[torch.dtype] = HALF,
) -> Iterator[tuple[tuple[object, ...], int, Merged]]:
    for m, n in SHAPES:
        for rank in (1, 2, 4, 8, 16, 32, 64):
            random = generator("lora", m, n, rank)
            base, change = (
                weight(random, m, n, 0.3 if rank % 3 == 1 else 0.0),
                low_rank(random, m, n, rank),
            )
            for dtype in dtypes:
                for ulp, mode in ((4, "grid"), (30, "master"), (5, "both")):
                    yield (
                        (m, n, dtype, rank, ulp, mode),
                        rank,
                        merged(base, change, ulp, dtype, mode),
                    )


def finetunes(
    strengths: tuple[float, ...] = (0.5, 4, 50),
    dtypes: Sequence[torch.dtype] = HALF,
) -> Iterator[tuple[tuple[object, ...], Merged]]:
    for (m, n), kind in (
        (shape, kind)
        for shape in SHAPES
        for kind in (".25", ".5", "1", "1.5", "2", "white", "blocks")
    ):
        random = generator("full", m, n, kind)
        base, change = weight(random, m, n), finetune(random, m, n, kind)
        for dtype in dtypes:
            for ulp in strengths:
                yield (m, n, dtype, kind, ulp), merged(base, change, ulp, dtype)


def product(found: module.LowRank) -> Array:
    return ((found.u * found.s.unsqueeze(-2)) @ found.vh).double().numpy()


def truncated(a: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def energy(x: Array) -> float:
    return float((x**2).sum())


def fixed_point(delta: Array, variances: Array, margin: float = 1.02) -> int:
    """Reference §2.3, steps 1 to 3, as they stand there, with the whole spectrum."""
    rows = variances.mean(1, keepdims=True)
    columns = (variances / rows).mean(0, keepdims=True)
    squares = np.linalg.svd(delta / np.sqrt(rows * columns), compute_uv=False) ** 2
    (m, n), rank = delta.shape, 0
    while True:
        sigma = squares[rank:].sum() / ((m - rank) * (n - rank))
        above = int((squares > (margin * (m**0.5 + n**0.5)) ** 2 * sigma).sum())
        if above <= rank:
            return rank
        rank = above


# the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DIGITS)
def test_floor_and_rows_are_those_of_the_ulps(dtype: torch.dtype) -> None:
    x = torch.from_numpy(weight(generator(0), 48, 70, 1.0)).to(dtype)
    x[3, :5] = 0
    x[4, :3] = (
        torch.finfo(dtype).smallest_normal * 0.5
    )  # its ulp is that of the smallest normal number
    found, exact = rounding_noise(x), variance(x)
    np.testing.assert_allclose(found.rows.numpy(), exact.mean(1), rtol=1e-5)
    assert float(found.floor) == pytest.approx(exact.sum(), rel=1e-5, abs=0)
    assert float(found.columns.mean()) == pytest.approx(1.0)
    scaled = (exact / exact.mean(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.columns.numpy(), scaled, rtol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_the_floor_is_what_rounding_does(dtype: torch.dtype) -> None:
    w = weight(generator(1), 200, 300, 0.5)
    error = torch.from_numpy(w).to(dtype).double().numpy() - w
    found = rounding_noise(torch.from_numpy(w).to(dtype))
    assert float(found.floor) == pytest.approx(energy(error), rel=0.02, abs=0)
    np.testing.assert_allclose(found.rows.numpy(), (error**2).mean(1), rtol=0.4)


def test_noise_of_two_files_of_different_dtypes_adds_up() -> None:
    w = torch.from_numpy(weight(generator(2), 40, 50))
    pair = w.half(), w.bfloat16()
    for one, two in (pair, pair[::-1]):
        found = rounding_noise(one, two)
        np.testing.assert_allclose(
            found.rows.numpy(), (variance(one) + variance(two)).mean(1), rtol=1e-5
        )
    assert torch.equal(rounding_noise(w.double()).rows.isfinite(), torch.ones(40, dtype=torch.bool))


def test_noise_of_batches_strides_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (
        torch.from_numpy(np.stack([weight(generator(3, i), 37, 50, 1.0) for i in range(6)]))
        .half()
        .reshape(2, 3, 37, 50)
    )
    whole = rounding_noise(x)
    assert whole.rows.shape == (2, 3, 37)
    assert whole.floor.shape == (2, 3)
    alone = rounding_noise(x[1, 2])
    torch.testing.assert_close(whole.rows[1, 2], alone.rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.columns[1, 2], alone.columns, rtol=1e-6, atol=0)
    turned = rounding_noise(x.mT.contiguous().mT)
    torch.testing.assert_close(turned.rows, whole.rows, rtol=1e-6, atol=0)
    monkeypatch.setattr(module, "SCRATCH", 120)  # two rows at a time
    torch.testing.assert_close(rounding_noise(x).columns, whole.columns, rtol=1e-6, atol=0)
    nothing = rounding_noise(torch.zeros(4, 5))
    assert torch.equal(nothing.columns, torch.ones(5, dtype=torch.float64))


def test_zero_share() -> None:
    x = torch.ones(2, 4, 5)
    x[1, :2] = 0
    assert zero_share(x).tolist() == [0.0, 0.5]
    assert zero_share(x).dtype == torch.float64
    assert float(zero_share(torch.zeros(3, 0))) == 1.0


# the rank --------------------------------------------------------------------------------------------------------


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", HALF)
def test_merged_loras_are_recognised_and_recovered_to_the_floor(dtype: torch.dtype) -> None:
    """From 4 ulp on, in 99 of 100; the estimate is as good as the number of its parameters allows."""
    wrong, errors, of = [], [], 0
    for name, rank, one in loras([dtype]):
        found = rank_above_noise(one.delta, one.noise)
        of += 1
        if int(found.rank) != rank or not bool(found.low_rank):
            wrong.append((name, int(found.rank), float(found.ratio)))
        m, n = one.delta.shape
        best = (
            rank * (m + n - rank) / (m * n) * one.floor
        )  # of noise, what fits into rank-r matrices near the truth
        errors.append(
            (energy(product(denoised(one.delta, one.noise, rank)) - one.truth) / best, name)
        )
        assert 0.5 < float(found.ratio) < 1.4, name
    assert of == 84
    assert len(wrong) <= 1, wrong
    assert np.median([error for error, _ in errors]) < 1.05
    # the rounding of one or two directions has structure of its own, which nothing tells from them
    assert max(errors)[0] < 5, max(errors)
    assert max(error for error, name in errors if int(str(name[3])) > 2) < 1.5


def test_the_rank_is_that_of_the_whole_spectrum() -> None:
    names = [
        ((320, 320), 8, 4.0),
        ((320, 640), 20, 10.0),
        ((640, 320), 3, 40.0),
        ((300, 2000), 60, 4.0),
    ]
    for dtype in HALF:
        for (m, n), rank, ulp in names:
            random = generator("svd", m, n)
            one = merged(
                weight(random, m, n, 0.5), low_rank(random, m, n, rank), ulp, dtype, "master"
            )
            expected = fixed_point(one.delta.double().numpy(), variance(one.rounded[0]))
            assert int(rank_above_noise(one.delta, one.noise).rank) == expected == rank


def test_a_finetune_is_low_rank_only_if_its_spectrum_is() -> None:
    """Where it is not beyond the rounding, whether it was trained so cannot be seen: the claim is checked by full SVD."""
    claimed = set()
    for name, one in finetunes((4, 50)):
        assert float(zero_share(one.delta)) < WEAK
        found = rank_above_noise(one.delta, one.noise)
        if not bool(found.low_rank):
            continue
        claimed.add(name[3])
        rank = int(found.rank)
        (m, n), a = one.delta.shape, one.delta.double().numpy()
        left = energy(a - truncated(a, rank)) / ((m - rank) * (n - rank)) * m * n
        assert left <= 1.35 * one.floor, name
    assert claimed <= {"1.5", "2"}


def test_the_finetunes_of_larger_layers_are_told_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    squares = module._squares

    def counted(white: Tensor, k: int, most: int) -> list[float]:
        calls.append(k)
        return squares(white, k, most)

    monkeypatch.setattr(module, "_squares", counted)
    random = generator("large")
    base = weight(random, 800, 900)
    full = merged(base, power_law(random, 800, 900, 0.5), 20, torch.bfloat16)
    found = rank_above_noise(full.delta, full.noise)
    assert (int(found.rank), bool(found.low_rank)) == (-1, False)
    exact = np.linalg.svd(full.delta.double().numpy(), compute_uv=False) ** 2
    left = [exact[r:].sum() / ((800 - r) * (900 - r)) * 800 * 900 / full.floor for r in (0, 256)]
    assert left[1] < float(found.ratio) < left[0]
    assert calls == [48]
    calls.clear()
    lora = merged(base, low_rank(random, 800, 900, 120), 10, torch.bfloat16)
    assert int(rank_above_noise(lora.delta, lora.noise).rank) == 120
    assert len(calls) <= 2  # the part said how many


@pytest.mark.parametrize(("lead", "dtype"), [(3e6, torch.float64), (3e7, torch.float32)])
def test_strong_directions_hide_nothing(lead: float, dtype: torch.dtype) -> None:
    """Rank 6 whose σ span seven decades: the weak three are far below what float32 sums of the whole can tell."""
    random = generator("decades")
    u, v = (np.linalg.qr(random.standard_normal((400, 6)))[0] for _ in range(2))
    noise = RoundingNoise(
        torch.full((400,), 1e-8, dtype=torch.float64), torch.ones(400, dtype=torch.float64)
    )
    sigma = 1e-4 * 40 * np.array([lead, lead / 2, lead / 30, 4.0, 3.0, 2.0])
    delta = torch.from_numpy((u * sigma) @ v.T + 1e-4 * random.standard_normal((400, 400))).to(
        dtype
    )
    found = rank_above_noise(delta, noise)
    assert (int(found.rank), bool(found.low_rank)) == (6, True)
    assert float(found.ratio) == pytest.approx(1.0, abs=0.05)
    assert float(found.sigma) == pytest.approx(1e-4, rel=0.03)


@pytest.mark.parametrize("shape", [(6, 9), (16, 16), (20, 60), (90, 80)])
def test_noise_of_small_matrices_seldom_stands_out(shape: tuple[int, int]) -> None:
    """At the 99.9 % point; the margin of 2 % alone lets a tenth through."""
    delta = torch.from_numpy(generator("white", *shape).standard_normal((1000, *shape)))
    ones = [torch.ones(1000, side, dtype=torch.float64) for side in shape]
    found = rank_above_noise(delta, RoundingNoise(*ones))
    assert int((found.rank != 0).sum()) <= 5


def test_an_adapter_merged_in_half_precision_is_low_rank_still() -> None:
    """The change itself was rounded to fp16 before it was added in float32: noise far above that of the file."""
    random = generator("half")
    change = torch.from_numpy(0.001 * low_rank(random, 320, 400, 12)).half().float()
    base = torch.from_numpy(weight(random, 320, 400)).float()
    tuned = base + change
    found = rank_above_noise(tuned - base, rounding_noise(tuned))
    assert (int(found.rank), bool(found.low_rank)) == (12, True)


def test_the_rounding_of_the_base_may_go_uncounted() -> None:
    random = generator("uncounted")
    one = merged(
        weight(random, 320, 400), low_rank(random, 320, 400, 12), 20, torch.float16, "both"
    )
    found = rank_above_noise(one.delta, rounding_noise(one.rounded[0]))
    assert (int(found.rank), bool(found.low_rank)) == (12, True)
    assert float(found.ratio) == pytest.approx(2.0, rel=0.1)


def test_directions_below_the_least_are_not_counted() -> None:
    random = generator("least")
    one = merged(
        weight(random, 320, 400), low_rank(random, 320, 400, 5), 10, torch.float16, "master"
    )
    sigma = np.linalg.svd(one.delta.double().numpy(), compute_uv=False) ** 2 / one.floor * 320 * 400
    found = rank_above_noise(one.delta, one.noise, least=float(sigma[2] + sigma[3]) / 2)
    whole = rank_above_noise(one.delta, one.noise)
    assert (int(found.rank), int(whole.rank)) == (3, 5)
    assert float(found.ratio) == float(whole.ratio)  # nor are they part of what remains


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (2, 3), (60, 300)])
def test_zero_and_small_shapes(shape: tuple[int, int]) -> None:
    random = generator("small", *shape)
    tuned = torch.from_numpy(weight(random, *shape)).half()
    noise = rounding_noise(tuned)
    nothing = rank_above_noise(torch.zeros(shape), noise)
    assert (int(nothing.rank), float(nothing.ratio), bool(nothing.low_rank)) == (0, 0.0, True)
    strong = rank_above_noise(torch.from_numpy(random.standard_normal(shape)).float(), noise)
    assert int(strong.rank) <= shape[0] * shape[1] // sum(shape)
    assert not bool(strong.low_rank)
    assert float(strong.ratio) > 100
    empty = denoised(torch.zeros(shape), noise, 2)
    assert not empty.s.any()
    assert torch.isfinite(empty.u).all()
    assert float(empty.residual) == 0.0


def test_a_rank_too_high_for_two_factors_is_none() -> None:
    random = generator("high")
    for rank, low in ((60, True), (70, False)):
        flat = (
            np.linalg.qr(random.standard_normal((128, rank)))[0]
            @ np.linalg.qr(random.standard_normal((128, rank)))[0].T
        )
        one = merged(weight(random, 128, 128), flat, 40, torch.float16)
        found = rank_above_noise(one.delta, one.noise)
        assert bool(found.low_rank) is low
        assert int(found.rank) == 60 or not low


def test_a_base_that_is_nowhere_rounded_has_no_noise() -> None:
    """A difference of exact rank without any: float64 of a synthetic pair; and a pruned weight, whose ulps are tiny."""
    a = torch.from_numpy(low_rank(generator("exact"), 200, 300, 7))
    for noise in (rounding_noise(a), rounding_noise(torch.zeros(200, 300, dtype=torch.bfloat16))):
        found = rank_above_noise(a.float(), noise)
        assert int(found.rank) == 7
        assert bool(found.low_rank)


def test_members_of_a_batch_strides_and_threads_change_nothing() -> None:
    random = generator("batch")
    base = weight(random, 320, 400)
    members = [
        merged(base, low_rank(random, 320, 400, rank), 10, torch.bfloat16)
        for rank in (2, 9, 30, 70)
    ]
    delta = torch.stack([one.delta for one in members]).reshape(2, 2, 320, 400)
    tuned = torch.stack([one.rounded[0] for one in members]).reshape(2, 2, 320, 400)
    found = rank_above_noise(delta, rounding_noise(tuned))
    assert found.rank.tolist() == [[2, 9], [30, 70]]
    assert found.rank.dtype == torch.int64
    for i, member in enumerate(members):
        alone = rank_above_noise(member.delta, member.noise)
        assert float(found.ratio.flatten()[i]) == pytest.approx(float(alone.ratio), rel=1e-6)
    turned = rank_above_noise(delta.mT.contiguous().mT, rounding_noise(tuned))
    assert torch.equal(turned.rank, found.rank)
    clean = denoised(delta, rounding_noise(tuned), 9)
    assert clean.u.shape == (2, 2, 320, 9)
    np.testing.assert_allclose(
        product(clean)[0, 1], product(denoised(members[1].delta, members[1].noise, 9)), atol=1e-7
    )
    none = rank_above_noise(delta[:0], rounding_noise(tuned[:0]))
    assert none.rank.shape == (0, 2)
    try:
        torch.set_num_threads(2)
        again, clean_again = (
            rank_above_noise(delta, rounding_noise(tuned)),
            denoised(delta, rounding_noise(tuned), 9),
        )
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again.rank, found.rank)
    assert torch.equal(again.low_rank, found.low_rank)
    # Lanczos stops by what rounding leaves: a block more or less moves the ratio within its tolerance
    torch.testing.assert_close(again.ratio, found.ratio, rtol=1e-3, atol=0)
    # one that barely rises above the noise is shrunk to a small difference of large numbers
    torch.testing.assert_close(
        clean_again.s, clean.s, rtol=1e-5, atol=1e-5 * float(clean.s[0, 0, 0])
    )


@pytest.mark.parametrize("ulp", [3e2, 1e4, 1e5])
def test_float32_files(ulp: float) -> None:
    """Their rounding is some 1e-13 of the energy, as far down as float32 sums and products themselves."""
    for rank in (1, 12):
        random = generator("float32", rank)
        one = merged(
            weight(random, 320, 400, 0.3), low_rank(random, 320, 400, rank), ulp, torch.float32
        )
        found = rank_above_noise(one.delta, one.noise)
        assert (int(found.rank), bool(found.low_rank)) == (rank, True)


def test_float8_files() -> None:
    random = generator("float8")
    one = merged(
        weight(random, 320, 400) * 20,
        low_rank(random, 320, 400, 6),
        8,
        torch.float8_e4m3fn,
        "master",
    )
    assert int(rank_above_noise(one.delta, one.noise).rank) == 6


# the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_denoised_is_closer_than_truncating(dtype: torch.dtype) -> None:
    """Never farther by more than chance, by a tenth closer and more where noise differs by row, a little where it is strong."""
    gains = {}
    for ulp in (0.5, 1.0, 4.0, 40.0):
        for rank, rows in ((2, 0.0), (8, 0.0), (8, 1.0), (30, 1.0)):
            random = generator("denoise", ulp, rank)
            one = merged(
                weight(random, 320, 400, rows),
                low_rank(random, 320, 400, rank),
                ulp,
                dtype,
                "master",
            )
            plain = energy(truncated(one.delta.double().numpy(), rank) - one.truth)
            found = denoised(one.delta, one.noise, rank)
            gains[ulp, rank, rows] = energy(product(found) - one.truth) / plain
            left = energy(one.delta.double().numpy() - product(found))
            assert float(found.residual) == pytest.approx(left, rel=1e-4, abs=0)
    assert max(gains.values()) < 1.002, gains
    assert max(gain for (_, _, rows), gain in gains.items() if rows) < 0.9, (
        gains
    )  # a tenth of it at .5 ulp
    assert max(gain for (ulp, _, rows), gain in gains.items() if not rows and ulp < 1) < 0.996, (
        gains
    )


def test_denoised_is_zero_within_the_noise() -> None:
    random = generator("nothing")
    one = merged(
        weight(random, 320, 400),
        np.ones((320, 400)) * 1e-9 + random.standard_normal((320, 400)) * 1e-9,
        1e-6,
        torch.float16,
        "master",
    )
    assert not denoised(one.delta, one.noise, 5).s.any()


# the vote --------------------------------------------------------------------------------------------------------


def test_vote() -> None:
    assert vote([8, 9, 8, 16]) == (8, 2, 4)
    assert vote(iter([16, 8, 16, 8])) == (8, 2, 4)  # noise only adds
    assert vote([-1]) == (-1, 1, 1)
    with pytest.raises(ValueError, match="no values to vote"):
        vote([])
