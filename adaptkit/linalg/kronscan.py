"""Which Kronecker product, if any, a difference (..., m, n) is: all splits at once, and the rank of the second factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg.kron import factorization, nearest_kron, rearrange
from adaptkit.linalg.krylov import eigenvalues, start_block
from adaptkit.linalg.noise import NoiseRank, RoundingNoise, rank_above_noise
from adaptkit.linalg.precision import accumulate_dtype, members, norm_squared, upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FACTORS",
    "RECOGNISED",
    "KronScan",
    "Split",
    "scan_kron",
    "second_noise",
    "second_rank",
    "splits",
]

FACTORS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, -1)
RECOGNISED = 0.5  # from this score on it is a product: others measured below .35, products above .6 (reference §3.4)
UNEXPLAINED = 4.0  # times the rounding: of a product less remains, .3 to 1.2, and twice that with a rounded base (§3.4)
NEGLIGIBLE = 1e-5  # of the energy: or so little, an adapter merged in half precision
GRAM_SIDE = 256  # up to so many blocks the Gram matrix costs no more than Lanczos, and gives coarser splits for nothing
RUN = 1 << 13  # products summed in float32 before float64 takes over
STEPS = 48  # of Lanczos at most
TOL = 1e-2  # of λ₁: Lanczos stops where an eigenvalue is known to lie this close; it is then closer by far
TIE = 1e-2  # of what the best score lacks to 1: splits within this, or within
EXACT = 1e-6  # this, are equally good
STRUCTURED = 1e-2  # of the rounding's energy: one direction of w2 may hold so much of it, measured .005 for rank 1


@dataclass(frozen=True)
class Split:
    """m × n as (a · c) × (b · d), and which `factors` cut it so.   w1: (a, b)   w2: (c, d), d including the window."""

    factors: tuple[int, ...]
    a: int
    b: int
    c: int
    d: int

    @property
    def parameters(self) -> int:
        """Of both factors, the second full."""
        return self.a * self.b + self.c * self.d


@dataclass(frozen=True)
class KronScan:
    """The nearest product of each split of a (..., m, n).   captured, score: (..., k)   total: (...,) = ‖X‖²

    captured = ‖X‖² − min ‖X − w1 ⊗ w2‖². score: 1 for a product, about 0 for what has no more of one than chance. In float64
    (float32 on MPS).
    """

    splits: tuple[Split, ...]
    captured: Tensor
    score: Tensor
    total: Tensor

    def recognised(self, floor: Tensor | None = None) -> Tensor:
        """Which of `splits` each member of the batch was made with, (...,), int64: the best score from .5 on, -1 where none is.

        Of equally good ones, which nest, the one with the fewest parameters. With `floor`, the ‖noise‖² expected of rounding,
        (...,): none that leaves more than four times that and more than 1e-5 of the energy. So a product is told from what
        merely resembles one, such as a difference whose entries have a mean.
        """
        if not self.splits:
            return torch.full(self.total.shape, -1, device=self.total.device)
        score = self.score
        if floor is not None:
            rounding = torch.maximum(
                UNEXPLAINED * floor.to(self.total), NEGLIGIBLE * self.total
            ).unsqueeze(-1)
            score = torch.where(self.total.unsqueeze(-1) - self.captured <= rounding, score, -1.0)
        best = score.amax(-1, keepdim=True)
        good = score >= best - TIE * (1 - best) - EXACT
        sizes = torch.tensor([split.parameters for split in self.splits], device=best.device)
        chosen = torch.where(good, sizes, sizes.max() + 1).argmin(-1)
        return torch.where(best.squeeze(-1) >= RECOGNISED, chosen, -1)


def splits(m: int, n: int, window: int = 1, factors: Sequence[int] = FACTORS) -> list[Split]:
    """The different ways `factors` cut an (m, n) whose columns are n / window inputs, those of one block or one entry left out.

    ShapeMismatch where the window does not divide n.
    """
    if n % window:
        raise ShapeMismatch(f"{n} columns are no multiple of a window of {window}")
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for factor in factors:
        (a, c), (b, d) = factorization(m, factor), factorization(n // window, factor)
        found.setdefault((a, b, c, d * window), []).append(factor)
    return [
        Split(tuple(who), *key)
        for key, who in found.items()
        if key[0] * key[1] > 1 and key[2] * key[3] > 1
    ]


def scan_kron(x: Tensor, window: int = 1, factors: Sequence[int] = FACTORS) -> KronScan:
    """How well each split of x (..., m, n) fits, w2 full: for recognising a product, and for choosing a factor.

    captured is λ₁ of R Rᵀ, R the rearrangement of x (Van Loan and Pitsianis 1993): up to 256 blocks from a Gram matrix, which
    also holds those of all splits whose blocks are unions of its own (its partial traces, reference §3.1), beyond by
    Lanczos, at most 1 % of λ₁ too low and rarely .1 %; where it is most of ‖x‖², by less than 1 % of what remains. Products
    in x's compute dtype: exact to about 1e-7 ‖x‖².

    score = (ρ − ρ₀) / (1 − ρ₀) with ρ = captured / ‖x‖² and ρ₀ = (√ab + √cd)² / mn, that of white noise (reference §3.4);
    but no more than twice the same with ρ₀ the share of the largest block, as a block that holds nearly all of x is no
    product. 0 for a zero x. Members of a batch are scanned one by one. x must be finite; ShapeMismatch where `window` does
    not divide n.
    """
    x = upcast(x)
    *batch, m, n = x.shape
    ways = splits(m, n, window, factors)
    total = norm_squared(x)
    captured, block = total.new_zeros(2, total.numel(), len(ways))
    for at, (member,) in enumerate(members(x)):
        captured[at], block[at] = _leading(member, ways)
    captured = captured.reshape(*batch, len(ways)).minimum(total.unsqueeze(-1))
    block = block.reshape(captured.shape).minimum(captured)
    return KronScan(tuple(ways), captured, _scores(captured, block, total, ways), total)


def _scores(captured: Tensor, block: Tensor, total: Tensor, ways: list[Split]) -> Tensor:
    noise = [((w.a * w.b) ** 0.5 + (w.c * w.d) ** 0.5) ** 2 / (w.a * w.b * w.c * w.d) for w in ways]
    chance = captured.new_tensor(noise).clamp_max(1.0)
    whole = torch.where(total > 0, total, 1.0).unsqueeze(-1)
    rho, share = captured / whole, block / whole
    found = torch.minimum(
        _beyond(rho, chance), torch.where(share < 1, 2 * _beyond(rho, share), 1.0)
    )
    return torch.where(total.unsqueeze(-1) > 0, found, 0.0)


def _beyond(rho: Tensor, least: Tensor) -> Tensor:
    """(ρ − ρ₀) / (1 − ρ₀), 0 where ρ₀ is 1."""
    return torch.where(least < 1, (rho - least) / torch.where(least < 1, 1 - least, 1.0), 0.0)


def _leading(x: Tensor, ways: list[Split]) -> tuple[Tensor, Tensor]:
    """Of every split of one x (m, n): λ₁, and the energy of the largest block."""
    values: dict[Split, tuple[float, float]] = {}
    for way in sorted(ways, key=lambda way: -way.a * way.b):
        if way in values:
            continue
        if way.a * way.b > GRAM_SIDE:
            values[way] = _lanczos(rearrange(x, way.a, way.b))
            continue
        gram = _gram(x, way.a, way.b)
        for other in ways:
            if way.a % other.a == 0 and way.b % other.b == 0:
                coarse = _coarser(gram, way, other)
                values[other] = float(eigenvalues(coarse)[0]), float(coarse.diagonal().max())
    found = torch.tensor(
        [values[way] for way in ways], dtype=accumulate_dtype(x.device), device=x.device
    )
    captured, block = found.reshape(-1, 2).unbind(-1)
    return captured, block


def _gram(x: Tensor, a: int, b: int) -> Tensor:
    """R Rᵀ (ab, ab) of x (a·c, b·d) in float64 (MPS: float32), R rearranged a piece at a time."""
    c, d = x.shape[0] // a, x.shape[1] // b
    blocks = x.reshape(a, c, b, d)
    total = torch.zeros(a * b, a * b, dtype=accumulate_dtype(x.device), device=x.device)
    step = max(1, RUN // d)
    for start in range(0, c, step):
        r = blocks[:, start : start + step].transpose(1, 2).reshape(a * b, -1)
        total += r @ r.mT
    return total


def _coarser(gram: Tensor, fine: Split, coarse: Split) -> Tensor:
    """The Gram matrix of the coarser split from that of the finer: G'[ij, kl] = Σ_pq G[(ip)(jq), (kp)(lq)]."""
    a, b = coarse.a, coarse.b
    shape = (a, fine.a // a, b, fine.b // b)
    return torch.einsum("ipjqkplq->ijkl", gram.reshape(*shape, *shape)).reshape(a * b, a * b)


def _lanczos(r: Tensor) -> tuple[float, float]:
    """λ₁ of R Rᵀ, and the energy of the largest row of r (p, q).

    One vector at a time, all kept orthogonal: matrix-vector products run at the speed of memory.
    """
    p = r.shape[0]
    largest = float(torch.linalg.vector_norm(r, dim=1).max()) ** 2
    basis = r.new_zeros(p, min(p, STEPS))
    tri = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    v, top = start_block(p, 1, seed=0).to(r).squeeze(-1), 0.0
    v = v / v.norm()
    for k in range(basis.shape[1]):
        basis[:, k] = v
        w = v @ r
        alpha = float(w.norm())
        u = r @ (w / alpha) if alpha else torch.zeros_like(v)
        for _ in range(2):
            u = u - basis[:, : k + 1] @ (u @ basis[:, : k + 1])
        beta = float(u.norm())
        tri[k, k] = alpha**2
        values, vectors = torch.linalg.eigh(tri[: k + 1, : k + 1])
        top = float(values[-1])
        if alpha * beta * abs(float(vectors[-1, -1])) <= TOL * top or k + 1 == basis.shape[1]:
            break
        tri[k, k + 1] = tri[k + 1, k] = alpha * beta
        v = u / beta
    return top, largest


def second_noise(noise: RoundingNoise, w1: Tensor) -> RoundingNoise:
    """The noise of M = Σᵢⱼ w1ᵢⱼ Xᵢⱼ (..., c, d), Xᵢⱼ the blocks of an X (..., a·c, b·d) with `noise`, for w1 (..., a, b)."""
    a, b = w1.shape[-2:]
    weights = w1.to(noise.rows.dtype).square()
    rows = noise.rows.reshape(*noise.rows.shape[:-1], a, -1)
    columns = noise.columns.reshape(*noise.columns.shape[:-1], b, -1)
    down = (weights @ columns.mean(-1, keepdim=True) * rows).sum(-2)
    across = (weights.mT @ rows.mean(-1, keepdim=True) * columns).sum(-2)
    mean = across.mean(-1, keepdim=True)
    return RoundingNoise(down, torch.where(mean > 0, across / mean, 1.0))


def second_rank(x: Tensor, noise: RoundingNoise, a: int, b: int) -> NoiseRank:
    """The rank of w2 in x (..., a·c, b·d) ≈ w1 (..., a, b) ⊗ w2 + noise: that of w1ᵀR, w1 the nearest product's, of length 1.

    Its noise is that of x summed with the squares of w1 (reference §3.4, 5 % of margin). Averaged over the blocks, it is that
    much weaker than in x: 14 ulp suffice for the rank, below 4 noise adds to it. What structure the rounding has (see
    `_enough` there) is not averaged away: directions of 1 % of its energy and less are not counted. Not `low_rank`: store
    w2 full.
    """
    best = nearest_kron(x, a, b)
    size = best.w1.square().sum((-2, -1), keepdim=True).sqrt()
    least = STRUCTURED * x.shape[-2] * x.shape[-1]
    return rank_above_noise(
        best.w2 * size, second_noise(noise, best.w1 / size), margin=1.05, least=least
    )
