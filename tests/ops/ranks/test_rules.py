from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from adaptkit.errors import NonFinite, NotRepresentable, WrongUsage
from adaptkit.ops.ranks import knapsack
from adaptkit.ops.ranks.knapsack import RankCurve, least_bytes, least_error
from adaptkit.ops.ranks.rules.contract import Policy, capped
from adaptkit.ops.ranks.rules.energy import Energy
from adaptkit.ops.ranks.rules.error import Error
from adaptkit.ops.ranks.rules.rank import Rank
from adaptkit.ops.ranks.rules.size import Size
from adaptkit.ops.ranks.rules.sv_cumulative import SvCumulative
from adaptkit.ops.ranks.rules.sv_fro import SvFro
from adaptkit.ops.ranks.rules.sv_ratio import SvRatio

pytestmark = pytest.mark.filterwarnings("error")  # numpy's, of divisions by nothing

Options = list[list[tuple[int, float]]]


def module(
    *sigmas: float, norm: float | None = None, step: int = 10, first: int = 0, conv: bool = False
) -> RankCurve:
    """`first` bytes for the module and `step` for each rank."""
    energies = [s * s for s in sigmas]
    sizes = [0, *(first + step * k for k in range(1, len(sigmas) + 1))]
    return RankCurve(energies, math.fsum(energies) if norm is None else norm, sizes, conv)


def total(modules: Sequence[RankCurve], ranks: Sequence[int]) -> int:
    return sum(m.sizes[k] for m, k in zip(modules, ranks, strict=True))


def lost(modules: Sequence[RankCurve], ranks: Sequence[int]) -> float:
    """‖ΔW − ΔW_k‖² over all, the obvious way."""
    return sum(m.norm - sum(m.energies[:k]) for m, k in zip(modules, ranks, strict=True))


def every_choice(modules: Sequence[RankCurve]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(m.sizes)) for m in modules)))[
        1:
    ]  # the first has nothing at all


def spectra(
    random: np.random.Generator, count: int, ranks: int, widths: Sequence[int] = (64, 96, 320)
) -> list[RankCurve]:
    """Decaying spectra on layers of several widths, in bytes of fp16."""
    found = []
    for _ in range(count):
        decay = np.exp(-np.arange(ranks) / random.uniform(2, ranks))
        energies = np.sort((random.lognormal() * decay * random.uniform(0.5, 1, ranks)) ** 2)[
            ::-1
        ].tolist()
        step = 2 * int(random.choice(widths) + random.choice(widths))
        found.append(
            RankCurve(energies, sum(energies), [0, *(300 + step * k for k in range(1, ranks + 1))])
        )
    return found


# --- module by module ------------------------------------------------------------------------------------------------


def test_F3_the_three_sv_rules_are_not_off_by_one() -> None:
    """sd-scripts keeps 3, 2 and 2 (shared/reference/failures.md)."""
    modules = [module(10, 5, 2, 1)]
    assert SvRatio(2.5).choose(modules) == [2]
    assert SvFro(0.85).choose(modules) == [1]
    assert SvCumulative(0.5).choose(modules) == [1]


@pytest.mark.parametrize(
    ("chosen", "ranks"),
    [
        (Rank(2), [2, 1, 2]),
        (Rank(3, conv_rank=1), [3, 1, 1]),
        (Rank(1, conv_rank=9), [1, 1, 2]),
        (Rank(9, max_rank=2), [2, 1, 2]),
        (Rank(9, conv_rank=9, max_rank=1), [1, 1, 1]),
    ],
)
def test_rank_as_far_as_a_layer_allows(chosen: Policy, ranks: list[int]) -> None:
    assert chosen.choose([module(4, 3, 2, 1), module(1), module(5, 5, conv=True)]) == ranks


@pytest.mark.parametrize(
    ("chosen", "rank"),
    [
        (SvRatio(1), 1),
        (SvRatio(1.99), 1),
        (SvRatio(2), 2),
        (SvRatio(5), 3),
        (SvRatio(9.99), 3),
        (SvRatio(10), 4),
        (SvRatio(math.inf), 4),
        (Energy(100 / 130), 1),
        (Energy(100.1 / 130), 2),
        (Energy(129 / 130), 3),
        (Energy(1), 4),
        (SvFro(math.sqrt(100.1 / 130)), 2),
        (SvFro(0.98), 2),
        (SvFro(1), 4),
        (SvCumulative(1e-9), 1),
        (SvCumulative(10 / 18), 1),
        (SvCumulative(15 / 18), 2),
        (SvCumulative(15.01 / 18), 3),
        (SvCumulative(1), 4),
    ],
)
def test_on_a_spectrum_by_hand(chosen: Policy, rank: int) -> None:
    """σ = 10, 5, 2, 1: Σσ² = 130, Σσ = 18."""
    assert chosen.choose([module(10, 5, 2, 1)]) == [rank]


@pytest.mark.parametrize("kind", [Energy, SvFro, SvCumulative])
def test_shares_that_are_met_exactly_need_no_further_rank(kind: Callable[[float], Policy]) -> None:
    """Ten equal values: 0.1 + 0.1 + 0.1 is not 0.3 in floating point, and must do."""
    for tenths in range(1, 11):
        share = math.sqrt(tenths / 10) if kind is SvFro else tenths / 10
        assert kind(share).choose([module(*[math.sqrt(0.1)] * 10)]) == [tenths]


def test_local_policies_against_their_definitions() -> None:
    random = np.random.default_rng(0)
    for m in spectra(random, 200, 12):
        energy = np.array(m.energies)
        sigma = np.sqrt(energy)
        share, ratio = random.uniform(0.05, 0.999), random.uniform(1, 30)
        kept = np.arange(1, 13)
        assert Energy(share).choose([m])[0] == kept[energy.cumsum() / energy.sum() >= share][0]
        assert (
            SvFro(share).choose([m])[0] == kept[np.sqrt(energy.cumsum() / energy.sum()) >= share][0]
        )
        assert SvCumulative(share).choose([m])[0] == kept[sigma.cumsum() / sigma.sum() >= share][0]
        assert SvRatio(ratio).choose([m])[0] == (sigma >= sigma[0] / ratio).sum()


@pytest.mark.parametrize("chosen", [Energy(0.6), SvFro(math.sqrt(0.6))])
def test_energy_counts_what_no_rank_captures(chosen: Policy) -> None:
    """Of ‖ΔW‖² = 200 two ranks capture 125; where 0.6 cannot be had, all that helps is kept, and not the zeros."""
    assert chosen.choose([module(10, 5, 2, 1, norm=200)]) == [2]
    assert chosen.choose([module(10, 5, 0, 0, norm=1000)]) == [2]


@pytest.mark.parametrize(
    "chosen",
    [Energy(0.9), Energy(1), SvFro(0.9), SvCumulative(0.9), SvRatio(20), SvRatio(1), Rank(1)],
)
def test_no_energy_is_rank_1_and_no_ranks_are_0(chosen: Policy) -> None:
    assert chosen.choose([module(0, 0, 0), RankCurve([], 0.0, [0]), RankCurve([], 3.0, [8])]) == [
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("kind", [Energy, SvFro, SvCumulative])
def test_share_1_leaves_out_only_zeros(kind: Callable[[float], Policy]) -> None:
    assert kind(1).choose([module(1, 0.5, 1e-6, 0, 0)]) == [3]


def test_the_cap_comes_after_the_rule() -> None:
    """Σσ over all four is 18, and half of it needs one rank however few are allowed."""
    modules = [module(10, 5, 2, 1)]
    assert SvCumulative(15 / 18, max_rank=3).choose(modules) == [2]
    assert SvCumulative(17 / 18, max_rank=2).choose(modules) == [2]
    assert Energy(1, max_rank=3).choose(modules) == [3]
    assert SvRatio(100, max_rank=1).choose(modules) == [1]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: Rank(0), "--rank"),
        (lambda: Rank(4, conv_rank=0), "--conv-rank"),
        (lambda: Rank(4, max_rank=0), "--max-rank"),
        (lambda: Energy(0.0), "--energy"),
        (lambda: Energy(1.01), "--energy"),
        (lambda: Energy(math.nan), "--energy"),
        (lambda: Error(-0.01), "--error"),
        (lambda: Error(1.01), "--error"),
        (lambda: Error(math.nan), "--error"),
        (lambda: Size(0), "--size"),
        (lambda: Size(5, max_rank=-1), "--max-rank"),
        (lambda: SvRatio(0.99), "--sv-ratio"),
        (lambda: SvRatio(math.nan), "--sv-ratio"),
        (lambda: SvFro(0), "--sv-fro"),
        (lambda: SvFro(1.5), "--sv-fro"),
        (lambda: SvCumulative(0), "--sv-cumulative"),
        (lambda: SvCumulative(2), "--sv-cumulative"),
    ],
)
def test_arguments_out_of_range_name_their_option(make: Callable[[], Policy], option: str) -> None:
    with pytest.raises(WrongUsage, match=f"^{option} must be"):
        make()


def test_the_ends_of_every_range_are_in_it() -> None:
    assert [
        Error(0),
        Error(1),
        Energy(1),
        SvFro(1),
        SvCumulative(1),
        SvRatio(1),
        Rank(1, 1, max_rank=1),
        Size(1),
    ]


def test_a_module_needs_a_size_for_every_rank() -> None:
    with pytest.raises(ValueError, match="2 energies"):
        RankCurve([2.0, 1.0], 3.0, [0, 10])


def test_errors_are_what_is_left_out() -> None:
    assert module(3, 2, 1).errors() == [14, 5, 1, 0]
    assert module(3, 2, 1, norm=20).errors() == [20, 11, 7, 6]
    assert module(3, 2, 1, norm=13.9).errors() == [
        14,
        5,
        1,
        0,
    ]  # a norm that rounding made too small
    assert module(1, 1e-9).errors()[1] == 1e-9**2  # 1 + 1e-18 - 1 would be 0
    assert RankCurve([], 3.0, [8]).errors() == [3]


def test_capped_keeps_the_norm() -> None:
    wide = module(3, 2, 1, conv=True)
    assert capped([wide], 2) == [RankCurve([9, 4], 14, [0, 10, 20], convolution=True)]
    assert capped([wide], 5) == [wide]
    assert capped([wide], None) == [wide]


# --- the whole adapter: error ----------------------------------------------------------------------------------------


def test_error_takes_the_cheapest_energy() -> None:
    """Of 200 a share of 0.25, 0.08 and 0.04 may go: the dear 18, the cheap 16, neither."""
    modules = [module(9, 4, step=1), module(math.sqrt(85), math.sqrt(18), step=100)]
    assert Error(0.5).choose(modules) == [1, 1]
    assert Error(0.3).choose(modules) == [2, 1]
    assert Error(0.29).choose(modules) == [1, 2]
    assert Error(0.2).choose(modules) == [2, 2]


def test_error_is_brute_force() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        modules = small(random)
        norm = sum(m.norm for m in modules)
        share = random.uniform(0, 1)
        ranks = Error(share).choose(modules)
        least = min(
            total(modules, c) for c in every_choice(modules) if lost(modules, c) <= share**2 * norm
        )
        assert lost(modules, ranks) <= share**2 * norm
        assert total(modules, ranks) == least


def small(random: np.random.Generator) -> list[RankCurve]:
    """Up to four modules of up to four ranks, integer energies, sizes of any convexity."""
    found = []
    for _ in range(random.integers(1, 5)):
        ranks = random.integers(1, 5)
        energies = sorted(map(float, random.integers(1, 40, ranks)), reverse=True)
        sizes = [0, *np.cumsum(random.integers(1, 30, ranks)).tolist()]
        found.append(RankCurve(energies, sum(energies), sizes))
    return found


def test_error_0_leaves_out_only_zeros() -> None:
    assert Error(0).choose([module(3, 2, 1e-6, 0, 0), module(1, 0, 0), module(0, 0)]) == [3, 1, 0]


def test_error_1_keeps_one_module() -> None:
    """An adapter of nothing cannot be written."""
    assert Error(1).choose([module(3, 2, step=7), module(4, 3, step=5), module(9, step=5)]) == [
        0,
        1,
        0,
    ]
    assert Error(0.5).choose([module(0, 0), module(0)]) == [1, 0]
    assert Error(0.5).choose([RankCurve([], 1.0, [4])]) == [0]
    assert Error(0.5).choose([]) == []


def test_an_error_out_of_reach_keeps_what_helps() -> None:
    modules = [module(3, 2, 1), module(3, 0, norm=50)]
    assert Error(0.1).choose(modules) == [3, 1]
    assert Error(0.1, max_rank=2).choose(modules) == [2, 1]


def test_an_error_within_reach_counts_what_the_cap_cuts_off() -> None:
    """One of 14 is lost to the cap, another of 15 to no rank at all."""
    assert Error(math.sqrt(4.9 / 14), max_rank=2).choose([module(3, 2, 1)]) == [2]
    assert Error(math.sqrt(5.1 / 14), max_rank=2).choose([module(3, 2, 1)]) == [1]
    assert Error(math.sqrt(5.9 / 15), max_rank=2).choose([module(3, 2, 1, norm=15)]) == [2]
    assert Error(math.sqrt(6.1 / 15), max_rank=2).choose([module(3, 2, 1, norm=15)]) == [1]


# --- the whole adapter: size -----------------------------------------------------------------------------------------


def test_size_is_brute_force() -> None:
    random = np.random.default_rng(2)
    for _ in range(300):
        modules = small(random)
        choices = every_choice(modules)
        limit = int(random.integers(min(total(modules, c) for c in choices), 250))
        ranks = Size(limit).choose(modules)
        assert total(modules, ranks) <= limit
        assert lost(modules, ranks) == min(
            lost(modules, c) for c in choices if total(modules, c) <= limit
        )


def test_size_never_misses_the_byte_that_makes_the_difference() -> None:
    modules = [module(3, 2, step=100, first=3), module(2.5, 1, step=90)]
    for ranks in every_choice(modules):
        exact = total(modules, ranks)
        assert total(modules, Size(max(exact, 90)).choose(modules)) <= max(exact, 90)
    assert Size(293).choose(modules) == [2, 1]
    assert Size(292).choose(modules) == [1, 2]


def test_more_bytes_never_lose_more() -> None:
    modules = spectra(np.random.default_rng(3), 5, 6)
    errors = [lost(modules, Size(limit).choose(modules)) for limit in range(1000, 25000, 150)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert len(set(errors)) > 40
    assert errors[-1] < 1e-12


def test_less_error_never_takes_fewer_bytes() -> None:
    modules = spectra(np.random.default_rng(4), 6, 8)
    sizes = [total(modules, Error(share / 100).choose(modules)) for share in range(101)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert len(set(sizes)) > 30


def test_size_under_a_cap() -> None:
    modules = [module(9, 8, 7), module(3, 2, 1)]
    assert Size(30).choose(modules) == [3, 0]
    assert Size(30, max_rank=2).choose(modules) == [2, 1]
    assert Size(10**6, max_rank=2).choose(modules) == [2, 2]


def test_size_spends_nothing_on_zeros() -> None:
    assert Size(10**6).choose([module(3, 2, 0, 0), module(0, 0), module(1)]) == [2, 0, 1]


def test_one_module_remains() -> None:
    assert Size(10).choose([module(0, 0), module(0, step=9)]) == [0, 1]
    assert Size(10).choose([RankCurve([], 1.0, [4]), RankCurve([], 1.0, [4])]) == [0, 0]
    assert Size(10).choose([]) == []


def test_a_size_below_the_smallest_file_names_it() -> None:
    modules = [module(3, 2, step=50), module(2, 1, step=40, first=4)]
    assert Size(44).choose(modules) == [0, 1]
    with pytest.raises(NotRepresentable, match="takes 44") as caught:
        Size(43).choose(modules)
    assert "--size 44" in (caught.value.hint or "")
    with pytest.raises(NotRepresentable, match="takes 144"):
        Size(143).choose(modules, lambda ranks: total(modules, ranks) + 100)


class File:
    """A made-up file: a header that grows with the digits of its offsets, padded to 8, and only for what is there."""

    def __init__(self, modules: Sequence[RankCurve], names: bool = False) -> None:
        self.modules, self.names, self.calls = modules, names, 0

    def __call__(self, ranks: Sequence[int]) -> int:
        self.calls += 1
        offset, header = 0, {}
        for n, (m, k) in enumerate(zip(self.modules, ranks, strict=True)):
            if k:
                entry = {"shape": [k, m.sizes[1]], "data_offsets": [offset, offset + m.sizes[k]]}
                header["lora_unet_down_blocks_attentions" * self.names + f"_{n}"] = entry
            offset += m.sizes[k]
        return 8 + math.ceil(len(json.dumps(header)) / 8) * 8 + offset


@pytest.mark.parametrize("names", [False, True], ids=["small header", "header of half the file"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.8, 0.95, 0.999])
def test_a_file_is_never_too_large_and_has_no_room_for_a_rank(share: float, names: bool) -> None:
    for seed in range(4):
        modules = spectra(
            np.random.default_rng(seed), 30, 8, (8, 12, 40) if names else (64, 96, 320)
        )
        file = File(modules, names)
        limit = int(share * file([8] * 30))
        ranks = Size(limit).choose(modules, file)
        assert file.calls <= 17
        assert file(ranks) <= limit
        for n in range(30):
            more = [k + (i == n) for i, k in enumerate(ranks)]
            assert ranks[n] == 8 or file(more) > limit


def test_every_byte_of_the_file_counts() -> None:
    """At exactly the size that some ranks take they are found again, and not with a byte less."""
    modules = spectra(np.random.default_rng(5), 12, 6)
    file = File(modules)
    for limit in range(20_000, 60_000, 4_321):
        ranks = Size(limit).choose(modules, file)
        exact = file(ranks)
        assert lost(modules, Size(exact).choose(modules, file)) <= lost(modules, ranks)
        assert file(Size(exact - 1).choose(modules, file)) < exact


def test_a_file_that_grows_unevenly() -> None:
    """Padded to pages of 4096 bytes, and a hundred bytes more for each module that is there."""
    modules = spectra(np.random.default_rng(6), 40, 8)

    def pages(ranks: Sequence[int]) -> int:
        return math.ceil((total(modules, ranks) + 100 * sum(map(bool, ranks))) / 4096) * 4096

    for limit in range(8_192, 150_000, 7_777):
        ranks = Size(limit).choose(modules, pages)
        assert limit - 4096 < pages(ranks) <= limit


@pytest.mark.parametrize("seed", range(12))
def test_a_file_that_jumps_is_filled_to_the_last_rank(seed: int) -> None:
    """What it takes beyond its ranks leaps here and there: only bisection finds the way."""
    random = np.random.default_rng(seed)
    sigmas = np.sort(random.random(100))[::-1].tolist()
    jumps = [(random.integers(100), random.integers(5000)) for _ in range(1 + seed % 3)]
    limit = int(random.integers(5500, 10_000))

    def size(ranks: Sequence[int]) -> int:
        return 100 * ranks[0] + sum(int(leap) for at, leap in jumps if ranks[0] >= at)

    best = max(k for k in range(1, 101) if size([k]) <= limit)
    assert Size(limit).choose([module(*sigmas, step=100)], size) == [best]


def test_a_size_that_nothing_foretells() -> None:
    """Up to 2000 bytes more or less, by a checksum of the ranks: still never too large, in a bounded number of calls."""
    modules = spectra(np.random.default_rng(7), 60, 8)
    asked: list[int] = []

    def noisy(ranks: Sequence[int]) -> int:
        asked.append(total(modules, ranks) + zlib.crc32(bytes(ranks)) % 2000)
        return asked[-1]

    for limit in range(10_000, 200_000, 3_333):
        asked.clear()
        size = noisy(Size(limit).choose(modules, noisy))
        assert 0.9 * limit < size <= limit
        assert len(asked) <= 18  # with the one of this test


def test_a_file_with_room_for_all_has_all() -> None:
    modules = spectra(np.random.default_rng(7), 20, 6)
    file = File(modules)
    everything = file([6] * 20)
    assert Size(everything).choose(modules, file) == [6] * 20
    assert Size(10 * everything).choose(modules, file) == [6] * 20
    assert Size(everything - 1).choose(modules, file) != [6] * 20


def test_as_large_as_sdxl() -> None:
    """722 modules of 128 ranks: all but 6 bytes of a million used, within 1e-5 of the linear bound."""
    modules = spectra(np.random.default_rng(8), 722, 128, (320, 640, 1280, 2048, 2560, 5120))
    file = File(modules)
    everything = file([128] * 722)
    for share in (0.02, 0.3):
        limit = int(share * everything)
        file.calls = 0
        ranks = Size(limit).choose(modules, file)
        assert file.calls <= 4
        assert limit * (1 - 1e-5) < file(ranks) <= limit
        bound = least_error(listed(modules), total(modules, ranks)).bound
        assert bound <= lost(modules, ranks) <= bound * (1 + 1e-5)
    found = least_bytes(listed(modules), 0.1 * sum(m.norm for m in modules))
    assert found.bound <= found.bytes <= found.bound * (1 + 1e-5)


def listed(modules: Sequence[RankCurve]) -> Options:
    return [list(zip(m.sizes, m.errors(), strict=True)) for m in modules]


# --- options of any kind ---------------------------------------------------------------------------------------------


def mixed(random: np.random.Generator, modules: int, options: int, bytes_: int = 40) -> Options:
    """Options in any order, dominated ones and equal ones among them; integers, so that sums are exact."""
    counts = random.integers(1, options + 1, modules)
    return [
        list(
            zip(
                random.integers(0, bytes_, n).tolist(),
                random.integers(0, 50, n).astype(float).tolist(),
                strict=True,
            )
        )
        for n in counts
    ]


def sums(options: Options) -> np.ndarray:
    """(choices, 2): bytes and error of every choice there is."""
    found = np.zeros((1, 2))
    for one in options:
        found = (found[:, None] + np.array(one)).reshape(-1, 2)
    return found


def table(options: Options, most: int) -> np.ndarray:
    """(most + 1,): the least error in at most so many bytes, by dynamic programming."""
    best = np.zeros(most + 1)
    for one in options:
        after = np.full(most + 1, np.inf)
        for size, error in one:
            after[size:] = np.minimum(after[size:], best[: most + 1 - size] + error)
        best = after
    return best


def test_any_options_are_brute_force_both_ways() -> None:
    random = np.random.default_rng(9)
    for _ in range(500):
        options = mixed(random, random.integers(1, 6), 5)
        every = sums(options)
        budget = int(random.integers(every[:, 0].min(), every[:, 0].max() + 2))
        found = least_error(options, budget)
        assert found.error == every[every[:, 0] <= budget, 1].min()
        assert found.bytes <= budget
        assert found.bound <= found.error
        allowed = float(random.integers(every[:, 1].min(), every[:, 1].max() + 2))
        found = least_bytes(options, allowed)
        assert found.bytes == every[every[:, 1] <= allowed, 0].min()
        assert found.error <= allowed
        assert found.bound <= found.bytes


def test_sums_are_of_what_is_chosen() -> None:
    options = mixed(np.random.default_rng(10), 20, 6)
    for found in (least_error(options, 300), least_bytes(options, 400.0)):
        assert found.bytes == sum(one[k][0] for one, k in zip(options, found.chosen, strict=True))
        assert found.error == sum(one[k][1] for one, k in zip(options, found.chosen, strict=True))


def test_errors_that_are_no_integers() -> None:
    """Tenths do not add up; the limit holds all the same, by the sum that rounds only once."""
    random = np.random.default_rng(0)
    for _ in range(400):
        tenths = [np.cumsum(np.sort(random.integers(1, 9, 4)))[::-1] / 10 for _ in range(5)]
        options = [[(7 * k, error) for k, error in enumerate(one.tolist())] for one in tenths]
        allowed = math.fsum(one[int(random.integers(4))][1] for one in options)
        found = least_bytes(options, allowed)
        assert found.error <= allowed
        every = sums(options)
        assert found.bytes <= every[every[:, 1] <= allowed * (1 - 1e-12), 0].min(initial=7 * 15)


def test_equal_costs_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sort alone is optimal, and the bound says so."""
    monkeypatch.setattr(knapsack, "CORE", 0)
    random = np.random.default_rng(12)
    for _ in range(100):
        energies = [
            sorted(random.integers(1, 99, random.integers(1, 9)).tolist(), reverse=True)
            for _ in range(9)
        ]
        options = [[(7 * k, float(sum(one[k:]))) for k in range(len(one) + 1)] for one in energies]
        merged = sorted(itertools.chain(*energies), reverse=True)
        budget = int(random.integers(0, 7 * len(merged) + 9))
        found = least_error(options, budget)
        assert found.error == sum(merged[budget // 7 :])
        assert found.bound == pytest.approx(found.error, rel=1e-12)
        allowed = float(random.integers(0, sum(merged)))
        assert least_bytes(options, allowed).bytes == 7 * next(
            k for k in range(len(merged) + 1) if sum(merged[k:]) <= allowed
        )


def test_many_modules_against_dynamic_programming() -> None:
    """60 modules of up to 8 options of any shape: exact, too."""
    random = np.random.default_rng(13)
    for _ in range(15):
        options = mixed(random, 60, 8)
        best = table(options, 1500)
        first = int(np.flatnonzero(np.isfinite(best))[0])
        for budget in (first, first + 37, first + 200, 900, 1500):
            assert least_error(options, budget).error == best[budget]
        for allowed in (best[-1], best[-1] + 17, best[-1] + 300):
            assert least_bytes(options, float(allowed)).bytes == np.flatnonzero(best <= allowed)[0]


def test_full_factors_at_the_end_against_dynamic_programming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """40 modules whose last option is dear and loses nothing, sizes with no common divisor, real errors.

    All 16 are exact. With a sixteenth of the states the worst loses 0.2 % more than it has to, with none 10 %.
    """
    worst = {knapsack.STATES: 0.0, knapsack.STATES // 16: 0.0, 0: 0.0}
    for seed in range(2):
        options = jumping(spectra(np.random.default_rng(seed), 40, 12, (64, 96, 77)))
        most = sum(one[-1][0] for one in options)
        best = table(options, most)
        for budget in np.linspace(0.02 * most, 0.95 * most, 8).astype(int).tolist():
            for states in worst:
                monkeypatch.setattr(knapsack, "STATES", states)
                found = least_error(options, budget)
                assert found.bound <= best[budget] * (1 + 1e-12)
                worst[states] = max(worst[states], float(found.error / best[budget] - 1))
    exact, few, none = worst.values()
    assert exact < 1e-12
    assert few < 0.01
    assert 0.01 < none < 0.3


def jumping(modules: Sequence[RankCurve]) -> Options:
    """Half of what each module has is in its last rank, for three times the bytes."""
    found = []
    for m in modules:
        errors = [error + m.norm / 2 for error in m.errors()[:-1]]
        sizes = [size // 2 for size in (*m.sizes[:-1], 3 * m.sizes[-1])]
        found.append(list(zip(sizes, [*errors, 0.0], strict=True)))
    return found


@pytest.mark.parametrize("core", [0, 1, 64])
@pytest.mark.parametrize("states", [1, 1000, 30000])
def test_no_option_more_would_fit(core: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is tried."""
    monkeypatch.setattr(knapsack, "STATES", states)
    monkeypatch.setattr(knapsack, "CORE", core)
    random = np.random.default_rng(15)
    for _ in range(60):
        options = mixed(random, 30, 8, 5000)
        least = sum(min(size for size, _ in one) for one in options)
        budget = least + int(random.integers(1, 40_000))
        found = least_error(options, budget)
        assert found.bytes <= budget
        assert found.error >= found.bound
        for one, k in zip(options, found.chosen, strict=True):
            room = budget - found.bytes + one[k][0]
            assert min(error for size, error in one if size <= room) == one[k][1]


def test_a_low_last_option_hides_those_before_it() -> None:
    """A LoKr whose last rank is a full factor: only the way from nothing to all of it is worth a step."""
    curve = [(k, 100.0 - 3 * k + 0.01 * k * k) for k in range(20)]
    options: Options = [[*curve, (20, 0.0)], [(0, 1000.0), (15, 500.0)]]
    assert least_error(options, 34).chosen == [19, 1]
    assert least_error(options, 35).chosen == [20, 1]
    assert least_error(options, 20).chosen == [5, 1]


def test_ties_go_to_the_first() -> None:
    same: Options = [[(0, 9.0), (5, 4.0), (5, 4.0), (6, 4.0)]] * 4
    assert least_error(same, 10).chosen == [1, 1, 0, 0]
    assert least_error(same, 14).chosen == [1, 1, 0, 0]


def test_limits_that_nothing_meets() -> None:
    options: Options = [[(3, 1.0), (9, 0.25)], [(4, 0.5)]]
    assert least_error(options, 7).chosen == [0, 0]
    with pytest.raises(NotRepresentable, match="takes 7 bytes"):
        least_error(options, 6)
    assert least_bytes(options, 0.75).chosen == [1, 0]
    with pytest.raises(NotRepresentable, match="is 0.75"):
        least_bytes(options, 0.74)


def test_no_modules_and_no_options() -> None:
    assert least_error([], 0) == knapsack.Allocation([], 0, 0.0, 0.0)
    assert least_bytes([], 0.0) == knapsack.Allocation([], 0, 0.0, 0.0)
    with pytest.raises(ValueError, match="without options"):
        least_error([[(1, 1.0)], []], 9)


def test_numbers_that_are_none() -> None:
    with pytest.raises(NonFinite):
        Size(100).choose([module(math.nan, 1)])
    with pytest.raises(NonFinite):
        least_error([[(1, math.inf)]], 9)


def test_importing_it_loads_no_numpy() -> None:
    code = (
        "import sys, adaptkit.ops.ranks.options\nassert not {'numpy', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
