"""Detect Kronecker products: their split, and the rank of w2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import ShapeMismatch
from adaptkit.linalg.kron.blocks import GRAM_SIDE, block_gram, factorization, rearrange
from adaptkit.linalg.kron.nearest import nearest_kron
from adaptkit.linalg.krylov import eigenvalues, start_block
from adaptkit.linalg.noise import NoiseRank, RoundingNoise, rank_above_noise
from adaptkit.linalg.precision import members, norm_squared, upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FACTORS",
    "RECOGNISED",
    "KronScan",
    "Split",
    "coarser",
    "scan_kron",
    "scored",
    "second_noise",
    "second_rank",
    "splits",
]

FACTORS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, -1)
# score: products measured above 0.6, everything else below 0.35
RECOGNISED = 0.5
# times the rounding noise: products leave 0.3 to 1.2, and twice that if the base was rounded
UNEXPLAINED = 4.0
NEGLIGIBLE = 1e-5  # of the energy: the residual of an adapter merged in half precision
STEPS = 48  # maximal number of Lanczos steps
# of λ₁: Lanczos stops once an eigenvalue is known to be this close; it is then far closer
TOL = 1e-2
TIE = 1e-2  # splits within this share of (1 − best score), or
EXACT = 1e-6  # within this score, are equally good
# of the rounding noise: one direction of w2 can hold up to 0.005 of its energy (measured, rank 1)
STRUCTURED = 1e-2


@dataclass(frozen=True)
class Split:
    """A split m × n = (a · c) × (b · d), and the `factors` that give it.

    w1: (a, b)   w2: (c, d), d including the convolution window
    """

    factors: tuple[int, ...]
    a: int
    b: int
    c: int
    d: int

    @property
    def parameters(self) -> int:
        """Number of parameters of both factors, with w2 full."""
        return self.a * self.b + self.c * self.d


@dataclass(frozen=True)
class KronScan:
    """The nearest product of each of k splits of a (..., m, n).

    captured, score: (..., k)   total: (...,) = ‖X‖²   in float64

    captured = ‖X‖² − min ‖X − w1 ⊗ w2‖². score is 1 for a product, and about 0 for a matrix that is
    no closer to one than chance.
    """

    splits: tuple[Split, ...]
    captured: Tensor
    score: Tensor
    total: Tensor

    def recognised(self, floor: Tensor | None = None) -> Tensor:
        """The index in `splits` that each member was made with, (...,), int64; -1 if none.

        The best score from 0.5 on; of equally good splits, which nest, the one with the fewest
        parameters. `floor`, (...,), is the expected ‖noise‖² of rounding. With it, a split is
        rejected if its residual exceeds both four times the noise and 1e-5 of the energy. This
        tells products from look-alikes, such as a difference whose entries have a mean.
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
    """The distinct splits of an (m, n) by `factors`, without those of one block or one entry.

    The columns are n / window inputs. Raises `ShapeMismatch` if the window does not divide n.
    """
    if n % window:
        raise ShapeMismatch(f"{n} columns are not a multiple of the window {window}")
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
    """Score each split of x (..., m, n) with w2 full, to detect a product or choose a factor.

    captured is λ₁ of R Rᵀ, with R the rearrangement of x (Van Loan and Pitsianis 1993). Up to 256
    blocks it comes from a Gram matrix, whose partial traces are the Gram matrices of all splits
    with unions of its blocks. Beyond that it comes from Lanczos: at most 1 % of λ₁ too low, rarely
    0.1 %, and, if it is most of ‖x‖², by less than 1 % of the rest. Products are in the compute
    dtype of x, exact to about 1e-7 ‖x‖².

    score = (ρ − ρ₀) / (1 − ρ₀) with ρ = captured / ‖x‖² and ρ₀ = (√ab + √cd)² / mn, the share that
    white noise gives. It is at most twice the same with ρ₀ the share of the largest block, because
    one block that holds nearly all of x is not a product. 0 for a zero x.

    The members of a batch are scanned one by one. x must be finite. Raises `ShapeMismatch` if
    `window` does not divide n.
    """
    x = upcast(x)
    *batch, m, n = x.shape
    ways = splits(m, n, window, factors)
    total = norm_squared(x)
    captured, block = total.new_zeros(2, total.numel(), len(ways))
    for at, (member,) in enumerate(members(x)):
        captured[at], block[at] = _leading(member, ways)
    shape = (*batch, len(ways))
    return scored(tuple(ways), captured.reshape(shape), block.reshape(shape), total)


def scored(ways: tuple[Split, ...], captured: Tensor, block: Tensor, total: Tensor) -> KronScan:
    """The scan with these λ₁ and energies of the largest block, both (..., k)."""
    # rounding may exceed ‖X‖² by 1e-7: clamp, so that scores stay at most 1
    captured = captured.minimum(total.unsqueeze(-1))
    block = block.minimum(captured)
    return KronScan(ways, captured, _scores(captured, block, total, ways), total)


def _scores(captured: Tensor, block: Tensor, total: Tensor, ways: Sequence[Split]) -> Tensor:
    noise = [((w.a * w.b) ** 0.5 + (w.c * w.d) ** 0.5) ** 2 / (w.a * w.b * w.c * w.d) for w in ways]
    chance = captured.new_tensor(noise).clamp_max(1.0)
    whole = torch.where(total > 0, total, 1.0).unsqueeze(-1)
    rho, share = captured / whole, block / whole
    found = torch.minimum(
        _beyond(rho, chance), torch.where(share < 1, 2 * _beyond(rho, share), 1.0)
    )
    return torch.where(total.unsqueeze(-1) > 0, found, 0.0)


def _beyond(rho: Tensor, least: Tensor) -> Tensor:
    """(ρ − ρ₀) / (1 − ρ₀); 0 if ρ₀ is 1."""
    return torch.where(least < 1, (rho - least) / torch.where(least < 1, 1 - least, 1.0), 0.0)


def _leading(x: Tensor, ways: list[Split]) -> tuple[Tensor, Tensor]:
    """λ₁ and the energy of the largest block, for every split of one x (m, n)."""
    values: dict[Split, tuple[float, float]] = {}
    # finest first: its Gram matrix gives all coarser splits
    for way in sorted(ways, key=lambda way: -way.a * way.b):
        if way in values:
            continue
        if way.a * way.b > GRAM_SIDE:
            values[way] = _lanczos(rearrange(x, way.a, way.b))
            continue
        gram = block_gram(x, way.a, way.b)
        for other in ways:
            if way.a % other.a == 0 and way.b % other.b == 0:
                coarse = coarser(gram, way, other)
                values[other] = float(eigenvalues(coarse)[0]), float(coarse.diagonal().max())
    found = torch.tensor([values[way] for way in ways], dtype=torch.float64, device=x.device)
    captured, block = found.reshape(-1, 2).unbind(-1)
    return captured, block


def coarser(gram: Tensor, fine: Split, coarse: Split) -> Tensor:
    """Coarsen a Gram matrix: G'[ij, kl] = Σ_pq G[(ip)(jq), (kp)(lq)]."""
    a, b = coarse.a, coarse.b
    shape = (a, fine.a // a, b, fine.b // b)
    return torch.einsum("ipjqkplq->ijkl", gram.reshape(*shape, *shape)).reshape(a * b, a * b)


def _lanczos(r: Tensor) -> tuple[float, float]:
    """λ₁ of R Rᵀ, and the energy of the largest row of r (p, q).

    Single-vector Lanczos with full reorthogonalisation; its matrix-vector products run at memory
    bandwidth.
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
        # residual norm of the top Ritz pair, which bounds the distance to an eigenvalue of R Rᵀ
        if alpha * beta * abs(float(vectors[-1, -1])) <= TOL * top or k + 1 == basis.shape[1]:
            break
        tri[k, k + 1] = tri[k + 1, k] = alpha * beta
        v = u / beta
    return top, largest


def second_noise(noise: RoundingNoise, w1: Tensor) -> RoundingNoise:
    """The noise of M = Σᵢⱼ w1ᵢⱼ Xᵢⱼ (..., c, d) for blocks Xᵢⱼ of an X with `noise`.

    X: (..., a·c, b·d)   w1: (..., a, b)
    """
    a, b = w1.shape[-2:]
    weights = w1.to(noise.rows.dtype).square()
    rows = noise.rows.reshape(*noise.rows.shape[:-1], a, -1)
    columns = noise.columns.reshape(*noise.columns.shape[:-1], b, -1)
    down = (weights @ columns.mean(-1, keepdim=True) * rows).sum(-2)
    across = (weights.mT @ rows.mean(-1, keepdim=True) * columns).sum(-2)
    mean = across.mean(-1, keepdim=True)
    return RoundingNoise(down, torch.where(mean > 0, across / mean, 1.0))


def second_rank(x: Tensor, noise: RoundingNoise, a: int, b: int) -> NoiseRank:
    """The rank of w2 in x (..., a·c, b·d) ≈ w1 (..., a, b) ⊗ w2 + noise.

    This is the rank of w1ᵀR, with w1 that of the nearest product, of unit length. Its noise is that
    of x summed with the squares of w1 (checked to 5 %). Averaging over the blocks weakens it: a
    change of 14 ulp suffices for the rank, below 4 ulp noise adds to it. Structure in the rounding
    (see `noise._enough`) does not average out, so directions of at most 1 % of its energy are not
    counted. If the result is not `low_rank`, store w2 full.
    """
    best = nearest_kron(x, a, b)
    size = best.w1.square().sum((-2, -1), keepdim=True).sqrt()
    least = STRUCTURED * x.shape[-2] * x.shape[-1]
    return rank_above_noise(
        best.w2 * size, second_noise(noise, best.w1 / size), margin=1.05, least=least
    )
