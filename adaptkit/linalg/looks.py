"""What is seen of stacks of differences on accelerators: Kronecker scans, and ranks above noise.

Each takes one look. The host decides as it does for single matrices; members that it cannot decide
from the numbers at hand are named, and examined by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.hosted import fetched, leading_pairs, on_host
from adaptkit.linalg.kron.blocks import GRAM_SIDE, rearrange
from adaptkit.linalg.kron.scan import (
    FACTORS,
    KronScan,
    Split,
    coarser,
    scored,
    splits,
)
from adaptkit.linalg.krylov import eigenvalues, gram_columns, start_block
from adaptkit.linalg.noise import (
    FIRST,
    FLOOR,
    HIDDEN,
    UNCOUNTED,
    Bar,
    RoundingNoise,
    Spikes,
    crowd_of,
    found_spikes,
    noise_edge,
    part_of,
    rank_limit,
    variances,
    weight,
)
from adaptkit.linalg.precision import norm_squared
from adaptkit.linalg.stacks import grams_of_space, suits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Ranks", "noise_of_stack", "ranks_of_stack", "scan_stack", "zeros_of_stack"]

WIDE = 1 << 14  # columns
LEAST_NOISE = 1e-90  # variance: its scale overflows float32
# columns and powers of a Gram matrix from which its largest eigenvalue comes: within 1e-7 on
# products, and 2.8 % on white noise of 1024 blocks, the worst case, where it is 0.4 % of the energy
WIDTH, POWERS = 32, 4


def noise_of_stack(rounded: Tensor) -> RoundingNoise:
    """`rounding_noise` of (B, m, n) without blocks of rows, in a third of the launches."""
    squares = variances([rounded])
    means = squares.mean(-1)
    # a row without noise adds nothing to any column
    inverse = means.clamp_min(torch.finfo(means.dtype).tiny).reciprocal_()
    columns = (inverse.unsqueeze(-2) @ squares).squeeze(-2).to(torch.float64)
    mean = columns.mean(-1, keepdim=True)
    rows = means.to(columns.dtype).mul_(weight(rounded.dtype))
    return RoundingNoise(rows, columns / mean.clamp_min(LEAST_NOISE))


def zeros_of_stack(delta: Tensor) -> Tensor:
    """`zero_share` of (B, m, n) in one pass."""
    count = delta.count_nonzero((-2, -1)).to(torch.float64)
    return 1.0 - count / max(1, delta.shape[-2:].numel())


def _whitened(delta: Tensor, noise: RoundingNoise) -> Tensor:
    """delta in its own memory, its rows and columns scaled to noise of variance 1.

    Without noise the scales are so large that nothing is told of the member.
    """
    scales = [
        x.maximum(FLOOR * x.mean(-1, keepdim=True)).clamp_min_(LEAST_NOISE).rsqrt_()
        for x in (noise.rows, noise.columns)
    ]
    rows, columns = (scale.to(delta.dtype) for scale in scales)
    return delta.mul_(rows.unsqueeze(-1)).mul_(columns.unsqueeze(-2))


class Ranks(NamedTuple):
    """The rank above the noise (−1 without one), and whether that and rounding are everything."""

    rank: int
    low_rank: bool


def ranks_of_stack(delta: Tensor, noise: RoundingNoise) -> list[Ranks | None]:
    """`rank_above_noise` of each of delta (B, m, n), which is overwritten; None: not told yet."""
    m, n = delta.shape[-2:]
    white = _whitened(delta, noise)
    wide = white if m >= n else white.mT
    limit, total = rank_limit(m, n), norm_squared(white)
    count = _first_count(limit)
    spaced = suits(count, min(m, n))
    parts = grams_of_space(wide, count, 0) if spaced else (gram_columns(wide),)
    crowd = part_of(white, limit)
    size, sample, *grams = fetched(total, crowd.mT @ crowd, *parts)
    bar = Bar(noise_edge(m, n))

    def told(whole: Tensor, sample: Tensor, *gram: Tensor) -> Ranks | None:
        if not all(bool(torch.isfinite(t).all()) for t in (whole, sample, *gram)):
            return None
        if spaced:
            values = leading_pairs(gram[0], gram[1], count).values
        else:
            values = torch.linalg.eigvalsh(gram[0]).flip(-1).clamp_min(0.0)[: limit + 1]
        sides = crowd.shape[-2], crowd.shape[-1]
        found = _counted(values.tolist(), float(whole), (m, n), bar, (sample, sides))
        return found and Ranks(found.rank, found.alone)

    return list(on_host(told, size, sample, *grams))


def _first_count(limit: int) -> int:
    """How many singular values are computed first."""
    return min(FIRST, limit + 1)


def _counted(
    squares: list[float],
    total: float,
    shape: tuple[int, int],
    bar: Bar,
    sample: tuple[Tensor, tuple[int, int]],
) -> Spikes | None:
    """The spikes of an (m, n) of energy `total` by its first σ² alone; None if those do not tell.

    `sample` is the Gram matrix of a random part, see `part_of`, and the sides of that.
    """
    (m, n), k = shape, len(squares)
    limit = rank_limit(m, n)
    if not total > 0 or (limit > 0 and total - sum(squares[:limit]) < HIDDEN * total):
        return None
    found = found_spikes(squares, (total, total, 0.0), (m, n, 0), bar)
    if found:
        return found if found.rank <= limit else found._replace(rank=-1)
    gram, sides = sample
    crowd = 0.0 if k > limit else crowd_of(eigenvalues(gram).tolist(), sides, limit)[0]
    if not (crowd > UNCOUNTED or k > limit):
        return None
    rest = max(0.0, total - sum(squares)) / ((m - k) * (n - k)) if k < min(m, n) else 0.0
    return Spikes(-1, max(crowd, rest), 1.0, 0.0)


# --- Kronecker scans -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """The numbers of one split of a stack, on the device.

    `gram` (B, s, s) is R Rᵀ with all its coarser splits, or `powers` (B, c, c) the Gram matrix of
    its powers times a start block. `block` (B,) is the norm of the largest block.
    """

    way: Split
    gram: Tensor | None
    powers: Tensor | None
    block: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.gram, self.powers, self.block) if t is not None]


def scan_stack(
    x: Tensor,
    total: Tensor,
    window: int,
    factors: Sequence[int] = FACTORS,
    beside: Sequence[Tensor] = (),
) -> tuple[KronScan, tuple[Tensor, ...]]:
    """`scan_kron` of x (B, m, n) with ‖x‖² = `total`, its numbers on the host.

    Other numbers `beside` (B, …) come with the same look.
    """
    ways = splits(x.shape[-2], x.shape[-1], window, factors)
    size = total.to(x.dtype).clamp_min_(torch.finfo(x.dtype).tiny)
    seen = list(_seen(x, size[:, None, None], ways))
    given = [t for one in seen for t in one.tensors]
    whole, *numbers = fetched(total, *beside, *given)
    others, numbers = tuple(numbers[: len(beside)]), numbers[len(beside) :]
    values: dict[Split, Tensor] = {}
    for one in seen:
        own, numbers = numbers[: len(one.tensors)], numbers[len(one.tensors) :]
        values |= _values(one, own, whole, [way for way in ways if way not in values])
    empty = whole.new_zeros(len(whole), 0, 2)
    found = torch.stack([values[way] for way in ways], 1) if ways else empty
    return scored(tuple(ways), found[..., 0], found[..., 1], whole), others


def _seen(x: Tensor, size: Tensor, ways: Sequence[Split]) -> Iterator[_Seen]:
    """Finest splits first: their Gram matrices give coarser ones. `size` (B, 1, 1) is ‖x‖²."""
    done: set[Split] = set()
    for way in sorted(ways, key=lambda way: -way.a * way.b):
        if way in done:
            continue
        r = rearrange(x, way.a, way.b)
        p, q = r.shape[-2:]
        if p <= GRAM_SIDE:
            done |= {other for other in ways if _coarse(other, way)}
            yield _Seen(way, _products(r), None, None)
            continue
        done.add(way)
        block = torch.linalg.vector_norm(r, dim=-1).amax(-1)
        gram = (r @ r.mT if p <= q else r.mT @ r).div_(size)
        vector = start_block(gram.shape[-1], WIDTH, 0).to(x.dtype).to(x.device)
        powers = [vector.expand(len(gram), *vector.shape)]
        for _ in range(POWERS):
            powers.append(gram @ powers[-1])
        yield _Seen(way, None, gram_columns(torch.cat(powers, -1)), block)


def _coarse(way: Split, fine: Split) -> bool:
    return fine.a % way.a == 0 and fine.b % way.b == 0


def _products(r: Tensor) -> Tensor:
    """R Rᵀ (B, p, p) of r (B, p, q), summed in float32 over `WIDE` columns, then in float64."""
    parts = [r[..., n : n + WIDE] for n in range(0, r.shape[-1], WIDE)]
    total = parts[0] @ parts[0].mT
    for part in parts[1:]:
        total = total.to(torch.float64).add_(part @ part.mT)
    return total


def _values(
    one: _Seen, numbers: Sequence[Tensor], total: Tensor, ways: Sequence[Split]
) -> dict[Split, Tensor]:
    """(captured, energy of the largest block) (B, 2) of the splits that these numbers tell."""
    if one.gram is None:
        energies = on_host(_largest, numbers[0])
        found = torch.tensor([value for (value,) in energies], dtype=total.dtype) * total
        return {one.way: torch.stack([found, numbers[1].square()], -1)}

    def both(gram: Tensor, way: Split) -> tuple[float, float]:
        coarse = torch.nan_to_num(coarser(gram, one.way, way), 0.0, 0.0, 0.0)
        return float(torch.linalg.eigvalsh(coarse)[-1]), float(coarse.diagonal().max())

    told = [way for way in ways if _coarse(way, one.way)]
    pairs = on_host(lambda gram: tuple(both(gram, way) for way in told), numbers[0])
    whole = torch.tensor(pairs, dtype=total.dtype)
    return {way: whole[:, n] for n, way in enumerate(told)}


def _largest(powers: Tensor) -> tuple[Tensor]:
    """The largest eigenvalue () of G, from the Gram matrix of [X, GX, G²X, …]."""
    inner = powers.shape[-1] - WIDTH
    image = powers[:inner, WIDTH:]
    return (leading_pairs(powers[:inner, :inner], (image + image.mT) / 2, 1).values[0],)
