"""Rounding noise in a difference of files, and the rank above it."""

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
from adaptkit.linalg.precision import SCRATCH, norm_squared, upcast

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

WEAK = 0.4  # share of exact zeros from which a difference is at or below the grid of its files
MAX_RANK = 256  # higher ranks are not searched
EXPLAINED = 1.25  # times the rounding noise: residuals of LoRAs measured 0.95 to 1.15
# or up to this, if the base's own rounding is not modelled and the spectrum ends in a step
UNCOUNTED = 2.5
STEP = 1.5  # ratio of σ² at that step: spectra of finetunes have none
# of the energy: a flat residual this small is an adapter merged in half precision, on any grid,
NEGLIGIBLE = 1e-5
# if σ² drops by this factor: its noise scales with each entry, and some directions exceed it
CLIFF = 100.0
FIRST = 48  # singular values computed first: enough for a LoRA of rank 32 and its noise
SPARE = 16  # values computed beyond the rank that a sample suggests
TOL = 1e-2  # of Lanczos: values above the noise converge first, the others need not
# of the energy: a smaller residual is visible only after subtracting the leading directions,
HIDDEN = 1e-4
LOST = 1e-6  # and below this share only if they are subtracted in float64
TINY = 1e-300
SPENT = 1e-14  # of the energy: the rest is float32 rounding
STRONG = 1e-3  # of the energy: a direction that hides the rest, if that is below HIDDEN
FEW = 2  # directions whose rounding has structure; with three or more it is noise
FLOOR = 1e-12  # of the mean variance: the least divisor of whitening
TRACY_WIDOM = 3.3  # 99.9 % point of the Tracy-Widom law: the edge of noise of finite size


@dataclass(frozen=True)
class RoundingNoise:
    """Variance rows[i] · columns[j] of entry (i, j).

    rows: (..., m)   columns: (..., n), mean 1   float64
    """

    rows: Tensor
    columns: Tensor

    @property
    def floor(self) -> Tensor:
        """The expected ‖noise‖²_F, (...,)."""
        return self.rows.sum(-1) * self.columns.shape[-1]


def rounding_noise(*rounded: Tensor) -> RoundingNoise:
    """Model the noise that rounding left in each of `rounded`, (..., m, n): Σ ulp²/12.

    Pass the tuned tensor, and also the base if it was rounded from a finer one that was tuned (a
    float32 master). ulp is that of each entry, subnormals included. `rows` are the means of its
    square, `columns` those of the rest: plain column means would let the largest rows dominate.
    Floating dtypes including float8. Entries must be finite and below 1e19.
    """
    first = rounded[0]
    *batch, m, n = first.shape
    rows = torch.zeros(*batch, m, dtype=torch.float64, device=first.device)
    columns = rows.new_zeros(*batch, n)
    step = max(1, SCRATCH // max(1, n))
    for start in range(0, m, step):
        part = slice(start, start + step)
        squares = variances([x[..., part, :] for x in rounded])
        means = squares.mean(-1)
        rows[..., part] = means
        inverse = torch.where(means > 0, 1.0 / (m * means), 0.0)
        columns += (inverse.unsqueeze(-2) @ squares).squeeze(-2)
    mean = columns.mean(-1, keepdim=True)
    return RoundingNoise(rows * weight(first.dtype), torch.where(mean > 0, columns / mean, 1.0))


def variances(rounded: list[Tensor]) -> Tensor:
    """Σ ulp²/12 in float32, in units of the first dtype's at 1, which avoids underflow."""
    unit = weight(rounded[0].dtype)
    squares = [
        _octaves(x).clamp_min_(torch.finfo(x.dtype).smallest_normal).square_() for x in rounded
    ]
    total = squares[0]
    for x, square in zip(rounded[1:], squares[1:], strict=True):
        total = total.add_(square, alpha=weight(x.dtype) / unit)
    return total


def weight(dtype: torch.dtype) -> float:
    """The variance of rounding numbers near 1."""
    return torch.finfo(dtype).eps ** 2 / 12


def _octaves(x: Tensor) -> Tensor:
    """2^⌊log₂|x|⌋ in float32, 0 for 0, from the exponent bits.

    Subnormals of shorter formats are normal in float32.
    """
    if x.itemsize == 1 and x.device.type == "cpu":  # torch would widen them one by one
        table = _octaves(torch.arange(256, dtype=torch.uint8).view(x.dtype).to(torch.float32))
        return table.index_select(0, x.reshape(-1).view(torch.uint8).int()).view(x.shape)
    # masks the eight exponent bits: 2^e exactly, while log2 could round
    return (x.to(torch.float32).view(torch.int32) & 0x7F800000).view(torch.float32)


def noise_edge(m: int, n: int, margin: float = 1.02) -> float:
    """The σ² that the largest singular value of m × n noise of variance 1 stays below.

    (√m + √n)² (Marchenko and Pastur 1967) with a margin, or the 99.9 % point for small matrices
    (Johnstone 2001). Singular values below it carry no information.
    """
    end = math.sqrt(m) + math.sqrt(n)
    # scale of the largest eigenvalue's fluctuation (Johnstone 2001, theorem 1.1)
    spread = end * math.cbrt(1 / math.sqrt(m) + 1 / math.sqrt(n))
    return max((margin * end) ** 2, end**2 + TRACY_WIDOM * spread)


def zero_share(delta: Tensor) -> Tensor:
    """The share of exact zeros in delta (..., m, n), (...,), float64.

    Above `WEAK` the difference is too close to the grid for any judgement.
    """
    count = torch.zeros(delta.shape[:-2], dtype=torch.float64, device=delta.device)
    # torch counts in int64 numbers of the size of what it counts: by blocks of rows
    step = max(1, SCRATCH // max(1, delta.shape[-1]))
    for start in range(0, delta.shape[-2], step):
        count += torch.count_nonzero(delta[..., start : start + step, :], dim=(-2, -1))
    return 1.0 - count / max(1, delta.shape[-2] * delta.shape[-1])


@dataclass(frozen=True)
class NoiseRank:
    """The rank of a (..., m, n) above its noise; fields (...,), float64.

    rank: int64, -1 if none was found.   sigma: rms entry of the residual.   ratio: energy of the
    residual over that of rounding.   low_rank: bool, whether `rank` directions and rounding are
    everything.
    """

    rank: Tensor
    sigma: Tensor
    ratio: Tensor
    low_rank: Tensor


class Spikes(NamedTuple):
    """Result for a whitened matrix.

    The number of directions, the variance of the residual, its share of the energy, and the step of
    σ² after the last direction.
    """

    rank: int
    variance: float
    share: float
    step: float

    @property
    def alone(self) -> bool:
        """Whether the residual is only rounding."""
        little = self.variance <= UNCOUNTED or self.share <= NEGLIGIBLE
        return self.rank >= 0 and (self.variance <= EXPLAINED or (little and self.step >= STEP))


def rank_above_noise(
    delta: Tensor,
    noise: RoundingNoise,
    margin: float = 1.02,
    least: float = 0.0,
    *,
    overwrite: bool = False,
) -> NoiseRank:
    """Count the singular values of delta (..., m, n) above its rounding noise.

    Rows and columns are scaled to equal noise. Then r ← #{σᵢ > edge(r)} is iterated from r = 0 to
    its fixed point. edge(r) is the end of the spectrum of noise with the variance of the residual:
    `margin` · (√m + √n) (Marchenko and Pastur 1967), or the 99.9 % point for small matrices
    (Johnstone 2001).

    `low_rank` if such an r exists up to 256 and mn/(m + n), and rounding explains the residual.
    This includes finetunes whose steep spectrum disappears in the noise. Otherwise ratio and sigma
    are those of noise of another origin, or, if rank is -1, of what the examined directions leave.

    Directions of at most `least` times the noise energy of an entry are structured noise. They
    belong to neither rank nor residual. A zero delta has rank 0 and is low rank. Only leading
    singular values are computed, by Lanczos, until r is among them. delta must be finite; with
    `overwrite` its memory is used.
    """
    *batch, m, n = delta.shape
    white = whitened(delta, noise, overwrite=overwrite)
    found = [
        _spikes(one, Bar(noise_edge(m, n, margin), least))
        for one in white.reshape(math.prod(batch), m, n)
    ]

    def stacked(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=delta.device).reshape(batch)

    wide = torch.float64
    ratio = stacked([one.variance for one in found], wide)
    rank, alone = (
        stacked([one.rank for one in found], torch.int64),
        stacked([one.alone for one in found], torch.bool),
    )
    return NoiseRank(rank, (ratio * noise.rows.mean(-1)).sqrt(), ratio, alone)


class Bar(NamedTuple):
    """Thresholds of σ² in variances: of the residual (`edge`), and of rounding (`least`)."""

    edge: float
    least: float = 0.0


def rank_limit(m: int, n: int) -> int:
    """mn/(m + n), beyond which two factors are no smaller than the matrix."""
    return min(MAX_RANK, m * n // max(1, m + n))


def whitened(delta: Tensor, noise: RoundingNoise, *, overwrite: bool = False) -> Tensor:
    """Scale rows and columns of delta (..., m, n) to noise of variance 1, in its compute dtype."""
    x = upcast(delta)
    rows, columns = (scale.reciprocal().to(x.dtype) for scale in _scales(noise))
    x = x.mul_(rows.unsqueeze(-1)) if overwrite else x * rows.unsqueeze(-1)
    return x.mul_(columns.unsqueeze(-2))


def _scales(noise: RoundingNoise) -> tuple[Tensor, Tensor]:
    """Standard deviations of rows and columns, with zeros replaced by 1."""
    means = noise.rows.mean(-1, keepdim=True), noise.columns.mean(-1, keepdim=True)
    pairs = zip((noise.rows, noise.columns), means, strict=True)
    rows, columns = (
        torch.where(mean > 0, x.maximum(FLOOR * mean), 1.0).sqrt() for x, mean in pairs
    )
    return rows, columns


def _spikes(white: Tensor, bar: Bar) -> Spikes:
    """Count the spikes of one whitened (m, n)."""
    m, n = white.shape
    limit = rank_limit(m, n)
    # `total` shrinks as strong directions are subtracted; `whole` stays for the shares
    whole = total = float(norm_squared(white))
    taken, last, k, asked = 0, 0.0, min(FIRST, limit + 1), False
    while total > SPENT * whole:
        squares = _squares(white, k, limit + 1)
        rest = total - sum(squares[: limit - taken])
        # float32 σ² are accurate to 1e-7 of σ₁² only: subtract what hides the rest, then look again
        if taken < limit and rest < HIDDEN * total:
            strong = sum(square > STRONG * total for square in squares)
            wide = torch.float64 if rest < LOST * total else white.dtype
            white = _deflated(white.to(wide), strong).to(white.dtype)
            taken, last = taken + strong, squares[strong - 1]
            total, k = float(norm_squared(white)), min(FIRST, limit + 1)
            continue
        found = found_spikes(squares, (total, whole, last), (m, n, taken), bar)
        if found:
            return found if found.rank <= limit else found._replace(rank=-1)
        k = len(squares)
        # one cheap look at a part decides whether more singular values are worth computing
        crowd, likely = (0.0, 2 * k) if asked or k > limit else _crowd(white, limit)
        # no low rank: noise well above rounding, or more directions than the limit
        if crowd > UNCOUNTED or k > limit:
            rest = max(0.0, total - sum(squares)) / ((m - k) * (n - k)) if k < min(m, n) else 0.0
            return Spikes(-1, max(crowd, rest), 1.0, 0.0)
        asked, k = True, min(max(likely, k + SPARE), limit + 1)
    return Spikes(taken, total / max(1, (m - taken) * (n - taken)), 0.0, math.inf)


def found_spikes(
    squares: list[float], energy: tuple[float, float, float], shape: tuple[int, int, int], bar: Bar
) -> Spikes | None:
    """The fixed point among `squares`, those of an (m, n) less `taken` directions; None if beyond.

    energy: (‖·‖² of that, of the whole, σ² of the last direction taken)
    """
    (total, whole, last), (m, n, taken) = energy, shape
    left = [total]
    for square in squares:
        left.append(max(0.0, left[-1] - square))
    variances = [
        # r directions take r(m + n − r) of the mn degrees of freedom
        rest / max(1, (m - taken - r) * (n - taken - r))
        for r, rest in enumerate(left[:-1])
    ]
    rank = _fixed(squares, variances, bar.edge)
    if rank is None:
        return None
    steps = [before / max(square, TINY) for before, square in pairwise([last, *squares])]
    other = variances[rank] > EXPLAINED  # noise of another origin than rounding
    # the fixed point overcounts if the noise has structure: stop at the first r that explains all
    for r in range(rank):
        cliff = left[r] <= NEGLIGIBLE * whole and steps[r] >= CLIFF
        if (other and cliff) or _enough(left[r], variances[r], whole, (m, n, taken + r)):
            rank = r
            break
    counted = sum(square > bar.least for square in squares[:rank])
    return Spikes(counted + taken, variances[rank], left[rank] / whole, steps[counted])


def _fixed(squares: list[float], variances: list[float], edge: float) -> int | None:
    """The least r = #{squares > edge · variances[r]}; None if it exceeds the known ones."""
    rank, above = 0, sum(square > edge * variances[0] for square in squares)
    while rank < above < len(squares):
        rank, above = above, sum(square > edge * variances[above] for square in squares)
    return rank if above <= rank else None


def _enough(rest: float, variance: float, whole: float, shape: tuple[int, int, int]) -> bool:
    """Whether one or two directions and rounding explain everything.

    If the base lies on the same grid, rounding is a function of the change. For a change of one or
    two vectors the rounding is then structured too, and up to 25 of its directions exceed the noise
    (measured: rank 1, 1280 × 1280, 4 ulp).
    """
    m, n, rank = shape
    return 1 <= rank <= FEW and whole - rest > m * n and variance <= 1 + 3 / math.sqrt(m * n)


def _squares(white: Tensor, k: int, most: int) -> list[float]:
    """The `k` leading squared singular values, descending.

    By Lanczos, or `most` eigenvalues if those are cheaper.
    """
    m, n = white.shape
    if 4 * k + 32 <= min(m, n):
        return energies(white, k, SvdSpec(k, method="lanczos", tol=TOL)).tolist()
    gram = gram_columns(white if m >= n else white.mT)
    found: list[float] = eigenvalues(gram)[:most].tolist()
    return found


def _deflated(white: Tensor, rank: int) -> Tensor:
    """white (m, n) without its `rank` leading directions, in its own memory."""
    top = truncated_svd(white, SvdSpec(rank))
    return white.addmm_(top.u * top.s, top.vh, alpha=-1.0)


def part_of(white: Tensor, limit: int) -> Tensor:
    """A random part of white (..., m, n) of 2 · `limit` rows and columns, no wider than high."""
    # a fixed seed: equal files must give equal reports
    draw = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randperm(side, generator=draw)[: 2 * limit].to(white.device)
        for side in white.shape[-2:]
    )
    part = white.index_select(-2, rows).index_select(-1, columns)
    return part if part.shape[-2] >= part.shape[-1] else part.mT


def _crowd(white: Tensor, limit: int) -> tuple[float, int]:
    """`crowd_of` the random part of one white (m, n)."""
    part = part_of(white, limit)
    squares: list[float] = eigenvalues(gram_columns(part)).tolist()
    return crowd_of(squares, (part.shape[0], part.shape[1]), limit)


def crowd_of(squares: list[float], sides: tuple[int, int], limit: int) -> tuple[float, int]:
    """Bound the noise variance from below, for rank at most `limit`; 0 if useless.

    `squares` are the squared singular values of a random part (p, q). Of that, r directions leave
    at least the energy beyond its r leading singular values (Eckart and Young 1936), and at most
    that of noise outside r of its dimensions. This detects finetunes cheaply. Also returns the
    number of singular values to compute next, judged by those that exceed the noise in the part;
    weak ones are missed.
    """
    p, q = sides
    tail = sum(squares[limit:])
    variances = [sum(squares[r:]) / ((p - r) * (q - r)) for r in range(q)]
    stand_out = _fixed(squares, variances, noise_edge(p, q, 1.0))
    return (
        tail / (p * (q - limit)) if tail > NEGLIGIBLE * sum(squares) else 0.0,
        limit + 1 if stand_out is None else stand_out + SPARE,
    )


def denoised(delta: Tensor, noise: RoundingNoise, rank: int) -> LowRank:
    """Estimate, with rank `rank`, what delta (..., m, n) was before rounding.

    Truncated in the metric of equal noise; singular values are shrunk by what noise adds to them
    (Gavish and Donoho 2017, Frobenius loss; Leeb 2021 for the scaling). In the compute dtype of
    delta; residual is ‖delta − estimate‖².
    """
    white = whitened(delta, noise)
    m, n = delta.shape[-2:]
    top = truncated_svd(white, SvdSpec(rank))
    variance = top.residual / max(1, (m - rank) * (n - rank))
    kept = _shrunk(top.s.to(variance.dtype), variance.unsqueeze(-1), (m, n)).to(top.s.dtype)
    rows, columns = (scale.to(white.dtype) for scale in _scales(noise))
    left = top.u * kept.unsqueeze(-2) * rows.unsqueeze(-1)
    # rescaling rows and columns destroys orthogonality: decompose once more
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
    """The most common of `of` values, and how many are equal to it."""

    value: int
    agree: int
    of: int


def vote(values: Iterable[int]) -> Vote:
    """The mode across layers, since training used one rank; of ties the smallest.

    Noise can only raise a rank.
    """
    counts = Counter(values)
    if not counts:
        raise ValueError("no values to vote on")
    value = min(counts, key=lambda one: (-counts[one], one))
    return Vote(value, counts[value], counts.total())
