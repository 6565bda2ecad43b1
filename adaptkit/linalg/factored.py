"""Products of two factors, never formed: their singular values and vectors, norms and inner products, on (..., m, r)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.errors import NonFinite
from adaptkit.linalg.krylov import eigh
from adaptkit.linalg.lowrank import LowRank, signed
from adaptkit.linalg.precision import accumulate_dtype, compute_dtype, supports_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Core", "factored_core", "factored_svd"]

CLEAR = 256.0  # times the length of a product: its terms may be so long, and float32 still gives six digits of it
LOST = 1e-4  # of ‖ΔW‖²: below it a loss is that of rounding alone, which float32 does not tell well enough
REGULAR = (
    1e-3  # of the largest pivot: a Gram matrix with none below is as good as its Cholesky factor
)

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Core:
    """The singular value decomposition of left (..., m, r) · right (..., r, n), in terms of the factors themselves.

    u = left · `left`, vh = `right` · right.   left: (..., r, r)   s: (..., r), descending   right: (..., r, r)

    In float64 (float32 on MPS); dead directions have s = 0 and no vectors. The largest entry of each column of `left` is
    positive. It is small: whoever has it may forget the factors and read them again. `grams`, (..., 2, r, r), are leftᵀ·left
    and right·rightᵀ of the factors, in float64; None where the core was found without them.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    grams: Tensor | None = None

    def head(self, rank: int) -> Core:
        """Of the leading `rank` triplets alone, in float32: their dtype once `kept` has multiplied them."""
        left, right = self.left[..., :rank].float(), self.right[..., :rank, :].float()
        return Core(left, self.s[..., :rank], right, self.grams)

    def members(self) -> Iterator[Core]:
        """Each core of a stack (one leading dimension)."""
        grams = [None] * len(self.s) if self.grams is None else self.grams
        return (Core(*own) for own in zip(self.left, self.s, self.right, grams, strict=True))

    @classmethod
    def stack(cls, cores: Sequence[Core], ranks: Sequence[int]) -> Core:
        """Cores, each with its leading `rank` triplets and zeros up to the highest rank."""
        most = max(ranks)
        s = torch.stack([core.s[:most] for core in cores])
        s *= torch.arange(most, device=s.device) < torch.tensor(ranks, device=s.device).unsqueeze(
            -1
        )
        left, right = [core.left[:, :most] for core in cores], [core.right[:most] for core in cores]
        grams = [core.grams for core in cores if core.grams is not None]
        whole = torch.stack(grams) if len(grams) == len(cores) else None
        return cls(torch.stack(left), s, torch.stack(right), whole)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.left, self.s, self.right, self.grams) if t is not None)

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the factors are multiplied by to be cut: (..., r, k) and (..., k, r), √s on both sides."""
        root = self.s.sqrt()
        return (self.left * root.unsqueeze(-2)).to(dtype), (root.unsqueeze(-1) * self.right).to(
            dtype
        )

    def kept(self, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(left (..., m, k), right (..., k, n)): the best approximation of rank k, √s on both sides.

        Computed in the dtype of the factors given.
        """
        ours, theirs = self.coefficients(left.dtype)
        return left @ ours[..., :rank], theirs[..., :rank, :] @ right

    def distances(self, factors: Factors, kept: Factors, stored: Factors) -> Tensor:
        """‖left · right − stored‖² (...,) in float64, `stored` being what rounding made of what was `kept`, all in float32.

        The Gram matrices of what is stored follow from those of the factors and from products with what rounding changed,
        which is small enough for float32: a quarter of the time of `product_distance`. NaN where that would not give six
        digits: where next to nothing is lost, or where a product of the factors cancels.
        """
        if self.grams is None:
            return torch.full_like(self.s[..., 0], math.nan)
        ours, theirs = (t.to(self.grams.dtype) for t in self.coefficients(kept[0].dtype))
        both = (
            (ours.mT, self.grams[..., 0, :, :], (stored[0] - kept[0]).mT, factors[0]),
            (theirs, self.grams[..., 1, :, :], stored[1] - kept[1], factors[1].mT),
        )
        (cross, own, clear), (other, second, clean) = (_stored_grams(*side) for side in both)
        total = self.energy
        found = total - 2.0 * (cross * other).sum((-1, -2)) + (own * second).sum((-1, -2))
        return torch.where((found > LOST * total) & clear & clean, found, math.nan)

    @property
    def energy(self) -> Tensor:
        """‖left · right‖² (...,) of the whole factors."""
        assert self.grams is not None
        return (self.grams[..., 0, :, :] * self.grams[..., 1, :, :]).sum((-1, -2))


def _stored_grams(
    cut: Tensor, gram: Tensor, change: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one side of a stored product, s = cut · factorᵀ + change (k, m): s · factor, s · sᵀ, and whether no digits cancel.

    cut: (..., k, r)   gram = factorᵀ · factor: (..., r, r)   change: (..., k, m)   factor: (..., m, r)
    """
    moved = (change @ factor).to(gram.dtype)
    half = moved @ cut.mT
    exact = cut @ gram
    own = exact @ cut.mT + half + half.mT + (change @ change.mT).to(gram.dtype)
    terms = cut.square().sum(-1) * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return exact + moved, own, (terms <= CLEAR**2 * own.diagonal(dim1=-2, dim2=-1)).all(-1)


def factored_core(left: Tensor, right: Tensor) -> Core:
    """The core of left (..., m, r) · right (..., r, n).

    Gram matrices and decompositions of r × r in float64: rank-revealing, as accurate as float64 QR down to σ/σ₁ of about
    1e-7, as cheap as float32 QR (reference §1.1). Without float64 (MPS), by QR in float32. NonFinite for NaN and infinity.
    """
    device = left.device
    wide = accumulate_dtype(device)
    up, down = left.to(wide), right.to(wide)
    if not supports_float64(device):
        return _by_qr(up, down)
    # r × r matrices belong on the CPU: see `eigh`
    grams = torch.stack([up.mT @ up, down @ down.mT], -3).cpu()
    root, solved = _root(grams[..., 0, :, :])
    squares, y = eigh(root.mT @ grams[..., 1, :, :] @ root)
    kept = squares > up.shape[-1] * torch.finfo(wide).eps * squares[..., :1]
    s = torch.where(kept, squares, 0.0).sqrt()
    ours, theirs = signed(
        solved(y) * kept.unsqueeze(-2), root @ y * _inverse(s, kept).unsqueeze(-2)
    )
    return Core(*(t.to(device) for t in (ours, s, theirs.mT, grams)))


def _root(gram: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """b with b bᵀ = gram (..., r, r), and what multiplies by the transposed pseudo-inverse of b.

    By Cholesky decomposition where gram is far from singular, by eigenvectors (four times as long) elsewhere.
    """
    low, failed = torch.linalg.cholesky_ex(gram)
    pivots = low.diagonal(dim1=-2, dim2=-1)
    if not bool(failed.any()) and bool((pivots.amin(-1) > REGULAR * pivots.amax(-1)).all()):
        return low, lambda y: torch.linalg.solve_triangular(low.mT, y, upper=True)
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("holds NaN or infinity")
    values, vectors = eigh(gram)
    alive = values > gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., :1]
    h = values.sqrt()
    inverse = vectors * _inverse(h, alive).unsqueeze(-2)
    return vectors * h.unsqueeze(-2), lambda y: inverse @ y


def _inverse(x: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, 1.0 / torch.where(alive, x, 1.0), 0.0)


def _by_qr(up: Tensor, down: Tensor) -> Core:
    """Through the small triangles of two QR decompositions, and their pseudo-inverses."""
    r1, r2 = torch.linalg.qr(up)[1], torch.linalg.qr(down.mT)[1]
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    missing = up.shape[-1] - s.shape[-1]  # k = r also where r exceeds a side of the product
    left, right = signed(torch.linalg.pinv(r1) @ u, (vh @ torch.linalg.pinv(r2.mT)).mT)
    pad = torch.nn.functional.pad
    return Core(pad(left, (0, missing)), pad(s, (0, missing)), pad(right.mT, (0, 0, 0, missing)))


def factored_svd(left: Tensor, right: Tensor) -> LowRank:
    """Exact SVD of left (..., m, r) · right (..., r, n), k = r: `factored_core`, applied.

    Dead directions have σ = 0 and a zero row of vh. u, s, vh in the compute dtype of both; residual 0.
    """
    dtype, wide = compute_dtype(left, right), accumulate_dtype(left.device)
    core = factored_core(left, right)
    u, v = signed(left.to(wide) @ core.left, (core.right @ right.to(wide)).mT)
    zero = torch.zeros(core.s.shape[:-1], dtype=core.s.dtype, device=core.s.device)
    return LowRank(u.to(dtype), core.s.to(dtype), v.mT.to(dtype), zero)
