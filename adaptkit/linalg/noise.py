"""What rounding to a file's dtype leaves in a difference of two (..., m, n), and the rank that stands out above it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.factored import factored_svd
from adaptkit.linalg.krylov import eigenvalues, gram_columns
from adaptkit.linalg.lowrank import LowRank, SvdSpec, energies, truncated_svd
from adaptkit.linalg.precision import SCRATCH, accumulate_dtype, norm_squared, upcast

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "MAX_RANK",
    "WEAK",
    "NoiseRank",
    "RoundingNoise",
    "Vote",
    "denoised",
    "noise_edge",
    "rank_above_noise",
    "rounding_noise",
    "vote",
    "zero_share",
]

WEAK = 0.4  # from this share of exact zeros on, a difference is at or below the grid of its files (reference §2.3)
MAX_RANK = 256  # ranks above are not looked for
EXPLAINED = 1.25  # a residual of up to this many times the rounding is rounding: of LoRAs .95 to 1.15 (reference §2.3)
UNCOUNTED = 2.5  # or up to this many, the base's own rounding being left out: if what stands out ends in a step
STEP = 1.5  # of σ², from the last direction to the next: the spectra of finetunes have none
NEGLIGIBLE = 1e-5  # of the energy: a flat residual this small is an adapter merged in half precision, whatever the grid,
CLIFF = 100.0  # and begins where σ² falls by so much: its noise is of each entry's own size, and has directions that stand out
FIRST = 48  # singular values looked at first: those of a LoRA of rank 32, and what tells them from noise
SPARE = 16  # looked at beyond the rank that a part suggests
TOL = 1e-2  # of Lanczos: values above the noise converge first, those within it need not
HIDDEN = 1e-4  # a residual below this share of the whole is only seen once the leading directions are subtracted,
LOST = 1e-6  # and below this one only if that is done in float64
TINY = 1e-300
SPENT = 1e-14  # what is left after that much of the energy is the rounding of float32
STRONG = 1e-3  # of the energy: a direction that hides the rest, where the rest is HIDDEN
FEW = 2  # directions whose rounding has structure; of three and more it is noise
FLOOR = 1e-12  # of the mean variance: whitening divides by no less
TRACY_WIDOM = 3.3  # its 99.9 % point: where noise of finite size ends


@dataclass(frozen=True)
class RoundingNoise:
    """Variance rows[i] · columns[j] of entry (i, j).   rows: (..., m)   columns: (..., n), mean 1   float64 (MPS: float32)"""

    rows: Tensor
    columns: Tensor

    @property
    def floor(self) -> Tensor:
        """The expected ‖noise‖²_F, (...,)."""
        return self.rows.sum(-1) * self.columns.shape[-1]


def rounding_noise(*rounded: Tensor) -> RoundingNoise:
    """The noise that rounding to their own dtype left in each of `rounded`, (..., m, n), all of one shape: Σ ulp²/12.

    Pass the tuned tensor; the base as well if it was rounded from something finer than what was tuned (a master in float32).
    ulp is that of each entry, subnormals included. rows are means of its square, columns those of what rows leave, a block of
    rows at a time (reference §2.3, whose plain column means let the largest rows speak for all). Floating dtypes, float8
    included; entries must be finite and below 1e19.
    """
    first = rounded[0]
    *batch, m, n = first.shape
    rows = torch.zeros(*batch, m, dtype=accumulate_dtype(first.device), device=first.device)
    columns = rows.new_zeros(*batch, n)
    step = max(1, SCRATCH // max(1, n))
    for start in range(0, m, step):
        part = slice(start, start + step)
        squares = _variances([x[..., part, :] for x in rounded])
        means = squares.mean(-1)
        rows[..., part] = means
        inverse = torch.where(means > 0, 1.0 / (m * means), 0.0)
        columns += (inverse.unsqueeze(-2) @ squares).squeeze(-2)
    mean = columns.mean(-1, keepdim=True)
    return RoundingNoise(rows * _weight(first.dtype), torch.where(mean > 0, columns / mean, 1.0))


def _variances(rounded: list[Tensor]) -> Tensor:
    """Σ ulp²/12 in float32, in units of the first dtype's at 1, which keeps them far from underflow."""
    unit = _weight(rounded[0].dtype)
    squares = [
        _octaves(x).clamp_min_(torch.finfo(x.dtype).smallest_normal).square_() for x in rounded
    ]
    total = squares[0]
    for x, square in zip(rounded[1:], squares[1:], strict=True):
        total = total.add_(square, alpha=_weight(x.dtype) / unit)
    return total


def _weight(dtype: torch.dtype) -> float:
    """The variance of rounding in the octave of 1."""
    return torch.finfo(dtype).eps ** 2 / 12


def _octaves(x: Tensor) -> Tensor:
    """2^⌊log₂|x|⌋ in float32, 0 for 0: the bits of the exponent alone. Subnormals of shorter formats are normal there."""
    return (x.to(torch.float32).view(torch.int32) & 0x7F800000).view(torch.float32)


def noise_edge(m: int, n: int, margin: float = 1.02) -> float:
    """The σ² of m × n noise of variance 1 that its largest singular value stays below: what lies there tells nothing.

    (√m + √n)² (Marchenko and Pastur 1967) with a margin, or the 99.9 % point for small matrices (Johnstone 2001).
    """
    end = math.sqrt(m) + math.sqrt(n)
    spread = end * math.cbrt(1 / math.sqrt(m) + 1 / math.sqrt(n))
    return max((margin * end) ** 2, end**2 + TRACY_WIDOM * spread)


def zero_share(delta: Tensor) -> Tensor:
    """The share of entries of delta (..., m, n) that are exactly 0, (...,), float64. Above `WEAK`, judge nothing by it."""
    count = torch.count_nonzero(delta, dim=(-2, -1)).to(accumulate_dtype(delta.device))
    return 1.0 - count / max(1, delta.shape[-2] * delta.shape[-1])


@dataclass(frozen=True)
class NoiseRank:
    """What stands out of the noise in a (..., m, n); every field (...,), float64 (MPS: float32) unless said otherwise.

    rank: int64, -1 where none was found.   sigma: rms of an entry of what remains.   ratio: its energy over that of the
    rounding.   low_rank: bool, whether the difference is `rank` directions and rounding.
    """

    rank: Tensor
    sigma: Tensor
    ratio: Tensor
    low_rank: Tensor


class _Spikes(NamedTuple):
    """Of a whitened matrix: how many directions, the variance of what remains, its share of the energy, the step in σ²."""

    rank: int
    variance: float
    share: float
    step: float

    @property
    def alone(self) -> bool:
        """Whether there is nothing else but rounding."""
        little = self.variance <= UNCOUNTED or self.share <= NEGLIGIBLE
        return self.rank >= 0 and (self.variance <= EXPLAINED or (little and self.step >= STEP))


def rank_above_noise(
    delta: Tensor, noise: RoundingNoise, margin: float = 1.02, least: float = 0.0
) -> NoiseRank:
    """How many singular values of delta (..., m, n) lie above its rounding noise (reference §2.3).

    Rows and columns are scaled to equal noise; then r ← #{σᵢ > edge(r)} from r = 0 until it stays, edge(r) being where the
    spectrum of noise of the residual's own variance ends: `margin` · (√m + √n) (Marchenko and Pastur 1967), or the 99.9 %
    point for small matrices (Johnstone 2001). `low_rank` where such an r exists at no more than 256 and mn/(m + n), and the
    residual is explained by rounding: also a finetune's, whose spectrum is so steep that no more of it is seen. Otherwise
    ratio and sigma are those of noise of other origin, or, where rank is -1, of what the directions looked at leave.
    Of those, directions of no more than `least` times the energy of the noise of an entry are noise of some structure: part
    of neither rank nor residual. A zero delta is low rank, of rank 0. Leading singular values only: by Lanczos, more of
    them until r lies inside. delta must be finite.
    """
    *batch, m, n = delta.shape
    white = _whitened(delta, noise)
    found = [
        _spikes(one, _Bar(noise_edge(m, n, margin), least))
        for one in white.reshape(math.prod(batch), m, n)
    ]

    def stacked(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=delta.device).reshape(batch)

    wide = accumulate_dtype(delta.device)
    ratio = stacked([one.variance for one in found], wide)
    rank, alone = (
        stacked([one.rank for one in found], torch.int64),
        stacked([one.alone for one in found], torch.bool),
    )
    return NoiseRank(rank, (ratio * noise.rows.mean(-1)).sqrt(), ratio, alone)


class _Bar(NamedTuple):
    """What σ² must exceed, in variances of the noise: those of what remains (`edge`), and 1, that of rounding (`least`)."""

    edge: float
    least: float = 0.0


def _limit(m: int, n: int) -> int:
    """Beyond mn/(m + n) two factors are no smaller than the matrix."""
    return min(MAX_RANK, m * n // max(1, m + n))


def _whitened(delta: Tensor, noise: RoundingNoise) -> Tensor:
    """delta (..., m, n) with rows and columns scaled so that noise has variance 1, in its compute dtype."""
    x = upcast(delta)
    rows, columns = (scale.reciprocal().to(x.dtype) for scale in _scales(noise))
    return (x * rows.unsqueeze(-1)).mul_(columns.unsqueeze(-2))


def _scales(noise: RoundingNoise) -> tuple[Tensor, Tensor]:
    """Standard deviations of rows and of columns, none of them 0."""
    means = noise.rows.mean(-1, keepdim=True), noise.columns.mean(-1, keepdim=True)
    pairs = zip((noise.rows, noise.columns), means, strict=True)
    rows, columns = (
        torch.where(mean > 0, x.maximum(FLOOR * mean), 1.0).sqrt() for x, mean in pairs
    )
    return rows, columns


def _spikes(white: Tensor, bar: _Bar) -> _Spikes:
    """Of one whitened (m, n)."""
    m, n = white.shape
    limit = _limit(m, n)
    whole = total = float(norm_squared(white))
    taken, last, k, asked = 0, 0.0, min(FIRST, limit + 1), False
    while total > SPENT * whole:
        squares = _squares(white, k, limit + 1)
        rest = total - sum(squares[: limit - taken])
        if taken < limit and rest < HIDDEN * total:
            strong = sum(square > STRONG * total for square in squares)
            wide = accumulate_dtype(white.device) if rest < LOST * total else white.dtype
            white = _deflated(white.to(wide), strong).to(white.dtype)
            taken, last = taken + strong, squares[strong - 1]
            total, k = float(norm_squared(white)), min(FIRST, limit + 1)
            continue
        found = _found(squares, (total, whole, last), (m, n, taken), bar)
        if found:
            return found if found.rank <= limit else found._replace(rank=-1)
        k = len(squares)
        crowd, likely = (0.0, 2 * k) if asked or k > limit else _crowd(white, limit)
        if crowd > UNCOUNTED or k > limit:
            rest = max(0.0, total - sum(squares)) / ((m - k) * (n - k)) if k < min(m, n) else 0.0
            return _Spikes(-1, max(crowd, rest), 1.0, 0.0)
        asked, k = True, min(max(likely, k + SPARE), limit + 1)
    return _Spikes(taken, total / max(1, (m - taken) * (n - taken)), 0.0, math.inf)


def _found(
    squares: list[float], energy: tuple[float, float, float], shape: tuple[int, int, int], bar: _Bar
) -> _Spikes | None:
    """The fixed point; None where it does not lie within `squares`, those of an (m, n) less `taken` directions.

    energy: (‖·‖² of that, of the whole, σ² of the last direction taken)
    """
    (total, whole, last), (m, n, taken) = energy, shape
    left = [total]
    for square in squares:
        left.append(max(0.0, left[-1] - square))
    variances = [
        rest / max(1, (m - taken - r) * (n - taken - r)) for r, rest in enumerate(left[:-1])
    ]
    rank = _fixed(squares, variances, bar.edge)
    if rank is None:
        return None
    steps = [before / max(square, TINY) for before, square in pairwise([last, *squares])]
    other = variances[rank] > EXPLAINED  # noise of other origin than rounding
    for r in range(rank):
        cliff = left[r] <= NEGLIGIBLE * whole and steps[r] >= CLIFF
        if (other and cliff) or _enough(left[r], variances[r], whole, (m, n, taken + r)):
            rank = r
            break
    counted = sum(square > bar.least for square in squares[:rank])
    return _Spikes(counted + taken, variances[rank], left[rank] / whole, steps[counted])


def _fixed(squares: list[float], variances: list[float], edge: float) -> int | None:
    """The least r = #{squares > edge · variances[r]}; None where that exceeds what is known of them."""
    rank, above = 0, sum(square > edge * variances[0] for square in squares)
    while rank < above < len(squares):
        rank, above = above, sum(square > edge * variances[above] for square in squares)
    return rank if above <= rank else None


def _enough(rest: float, variance: float, whole: float, shape: tuple[int, int, int]) -> bool:
    """Whether r = 1 or 2 directions far outweigh rounding, and that explains all the energy they leave.

    On a grid that the base lies on, rounding is a function of the change: where that is a function of one or two vectors, its
    rounding has structure too, and up to 25 directions of it stand out of the noise (measured: rank 1, 1280 × 1280, 4 ulp).
    """
    m, n, rank = shape
    return 1 <= rank <= FEW and whole - rest > m * n and variance <= 1 + 3 / math.sqrt(m * n)


def _squares(white: Tensor, k: int, most: int) -> list[float]:
    """The `k` leading squared singular values, descending: by Lanczos, or `most` eigenvalues where those are cheaper."""
    m, n = white.shape
    if 4 * k + 32 <= min(m, n):
        return energies(white, k, SvdSpec(k, method="lanczos", tol=TOL)).tolist()
    gram = gram_columns(white if m >= n else white.mT)
    found: list[float] = eigenvalues(gram)[:most].tolist()
    return found


def _deflated(white: Tensor, rank: int) -> Tensor:
    """white (m, n) without its `rank` leading directions."""
    top = truncated_svd(white, SvdSpec(rank))
    return torch.addmm(white, top.u * top.s, top.vh, alpha=-1.0)


def _crowd(white: Tensor, limit: int) -> tuple[float, int]:
    """A lower bound on the variance of the noise of white (m, n) if its rank is at most `limit`, 0 where that is idle.

    On a random part of twice that size, r directions leave at least the energy beyond its r leading singular values (Eckart
    and Young 1936), and no more than all that noise has beside r of its dimensions. So finetunes are told at a small cost.
    And how many singular values it then takes, judging by those that stand out of the part: weak ones do not.
    """
    draw = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randperm(side, generator=draw)[: 2 * limit].to(white.device) for side in white.shape
    )
    part = white[rows][:, columns]
    part = part if part.shape[0] >= part.shape[1] else part.mT
    p, q = part.shape
    squares: list[float] = eigenvalues(gram_columns(part)).tolist()
    tail = sum(squares[limit:])
    variances = [sum(squares[r:]) / ((p - r) * (q - r)) for r in range(q)]
    stand_out = _fixed(squares, variances, noise_edge(p, q, 1.0))
    return (
        tail / (p * (q - limit)) if tail > NEGLIGIBLE * sum(squares) else 0.0,
        limit + 1 if stand_out is None else stand_out + SPARE,
    )


def denoised(delta: Tensor, noise: RoundingNoise, rank: int) -> LowRank:
    """The estimate of rank `rank` of what delta (..., m, n) was before rounding.

    Truncated where rows and columns have equal noise, singular values shrunk by what noise adds to them (Gavish and Donoho
    2017, Frobenius loss; Leeb 2021 for the scaling). In the compute dtype of delta; residual is ‖delta − estimate‖².
    """
    white = _whitened(delta, noise)
    m, n = delta.shape[-2:]
    top = truncated_svd(white, SvdSpec(rank))
    variance = top.residual / max(1, (m - rank) * (n - rank))
    kept = _shrunk(top.s.to(variance.dtype), variance.unsqueeze(-1), (m, n)).to(top.s.dtype)
    rows, columns = (scale.to(white.dtype) for scale in _scales(noise))
    left = top.u * kept.unsqueeze(-2) * rows.unsqueeze(-1)
    found = factored_svd(left, top.vh * columns.unsqueeze(-2))
    residual = norm_squared(upcast(delta) - (found.u * found.s.unsqueeze(-2)) @ found.vh)
    return LowRank(found.u, found.s, found.vh, residual)


def _shrunk(s: Tensor, variance: Tensor, shape: tuple[int, int]) -> Tensor:
    """√((s² − (m + n)σ²)² − 4mnσ⁴) / s, and 0 for s within the noise."""
    m, n = shape
    square = s.square()
    rest = (square - (m + n) * variance).square() - 4 * m * n * variance.square()
    above = square > (math.sqrt(m) + math.sqrt(n)) ** 2 * variance
    return torch.where(above, rest.clamp_min(0.0).sqrt() / torch.where(above, s, 1.0), 0.0)


class Vote(NamedTuple):
    """The commonest of `of` values, and how many agree with it."""

    value: int
    agree: int
    of: int


def vote(values: Iterable[int]) -> Vote:
    """The mode across layers: training used one rank. Of equally common ones the smallest, as noise only ever adds."""
    counts = Counter(values)
    if not counts:
        raise ValueError("nobody votes")
    value = min(counts, key=lambda one: (-counts[one], one))
    return Vote(value, counts[value], counts.total())
