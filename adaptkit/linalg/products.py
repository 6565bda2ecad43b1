"""Inner products and distances of matrices in factored form, without forming them.

A product is a pair (left (..., m, r), right (..., r, n)). A Kronecker product is a pair
(w1 (a, b), w2 (c, d)) that means w1 ⊗ w2. Factors are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptkit.linalg.kron.blocks import kron_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Comparison",
    "Operand",
    "balanced",
    "compare_kron",
    "compare_products",
    "distance_squared",
    "in_blocks",
    "inner",
    "kron_norm",
    "kron_product_inner",
    "product_distance",
    "product_inner",
    "product_norm",
    "rearranged",
    "row_energies",
    "wide_blocks",
]

Factors = tuple[Tensor, Tensor]

# Below this share of the norms, a difference of Gram matrices has lost digits that a QR keeps.
CANCELLED = 1e-10
# Below this share of the norms, `Comparison.distance` is computed apart from the Gram numbers.
NEAR = 1e-6
BLOCK = 1 << 17  # entries of a block of rows: 1 MB in float64


def product_inner(one: Factors, two: Factors) -> Tensor:
    """⟨left · right, left' · right'⟩_F, (...,), as tr((leftᵀ left')(right' rightᵀ))."""
    return ((one[0].mT @ two[0]) * (one[1] @ two[1].mT)).sum((-1, -2))


def product_distance(one: Factors, two: Factors, norm: float | None = None) -> Tensor:
    """‖left · right − left' · right'‖²_F, (...,). `norm` is ‖left · right‖² if it is known.

    Computed from small Gram matrices. Where those cancel, it is computed from the triangles of
    two QR decompositions, whose error is machine precision of the norms and not of their squares.
    Equal factors give exactly 0.
    """
    for same, other in ((1, 0), (0, 1)):
        if one[same].shape == two[same].shape and torch.equal(one[same], two[same]):
            change = one[other] - two[other]
            pair = (change, one[1]) if same == 1 else (one[0], change)
            return product_inner(pair, pair).clamp_min(0.0)
    total = (product_inner(one, one) if norm is None else norm) + product_inner(two, two)
    found = total - 2.0 * product_inner(one, two)
    if bool((found < CANCELLED * total).any()):
        left, right = torch.cat([one[0], -two[0]], -1), torch.cat([one[1], two[1]], -2)
        r1, r2 = torch.linalg.qr(left)[1], torch.linalg.qr(right.mT)[1]
        found = (r1 @ r2.mT).square().sum((-1, -2))
    return found.clamp_min(0.0)


def product_norm(factors: Factors) -> float:
    """‖left · right‖²_F."""
    return max(0.0, float(product_inner(factors, factors)))


def balanced(factors: Factors) -> Factors:
    """The same product, its factors of similar norm. Scaled by a power of two: exact."""
    left, right = (float(factor.norm()) for factor in factors)
    if left == 0.0 or right == 0.0:
        return factors
    scale = 2.0 ** round(math.log2(right / left) / 2)
    return factors[0] * scale, factors[1] / scale


def rearranged(kron: Factors) -> Factors:
    """vec(w1) and vec(w2)ᵀ: w1 ⊗ w2 with its entries rearranged is their product, of rank 1.

    See Van Loan and Pitsianis (1993). Rearranging keeps norms and inner products.
    """
    return kron[0].reshape(-1, 1), kron[1].reshape(1, -1)


def kron_norm(kron: Factors) -> float:
    """‖w1 ⊗ w2‖²_F."""
    return _dot(kron[0], kron[0]) * _dot(kron[1], kron[1])


def kron_product_inner(kron: Factors, product: Factors) -> float:
    """⟨w1 ⊗ w2, left · right⟩_F = Σ_p ⟨w1, Uₚ w2 Vₚᵀ⟩.

    Uₚ (a, c) is column p of left, Vₚ (b, d) is row p of right, both reshaped.
    """
    (one, two), (left, right) = kron, product
    u = left.mT.reshape(-1, one.shape[0], two.shape[0])
    v = right.reshape(-1, one.shape[1], two.shape[1])
    return float(((u @ two @ v.mT) * one).sum())


def row_energies(dense: Tensor | None, product: Factors | None, kron: Factors | None) -> Tensor:
    """The squared norms of the rows of a matrix, (m,), from the one form that is given.

    Of a product: the diagonal of left (right rightᵀ) leftᵀ.
    """
    if kron is not None:
        return torch.kron(*(one.double().square().sum(-1) for one in kron))
    if product is not None:
        left, right = (one.double() for one in product)
        return ((left @ (right @ right.mT)) * left).sum(-1).clamp_min(0.0)
    assert dense is not None
    return dense.double().square().sum(-1)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.reshape(-1).dot(other.reshape(-1)))


# --- two matrices, all numbers ---------------------------------------------------------------


class Comparison(NamedTuple):
    """‖A‖², ‖B‖², ⟨A, B⟩ and ‖A − B‖²."""

    one: float
    two: float
    inner: float
    distance: float


def compare_products(a: Factors, b: Factors) -> Comparison:
    """Compare two products; their distance keeps the precision of the norms."""
    one, two, both = product_norm(a), product_norm(b), float(product_inner(a, b))
    distance = one + two - 2.0 * both
    if distance < NEAR * (one + two):
        distance = _close_distance(a, b)
    return Comparison(one, two, both, distance)


def compare_kron(kron: Factors, product: Factors) -> Comparison | None:
    """Compare a Kronecker product with a product; None if they are too close to tell apart."""
    one, two = kron_norm(kron), product_norm(product)
    both = kron_product_inner(kron, product)
    distance = one + two - 2.0 * both
    return None if distance < NEAR * (one + two) else Comparison(one, two, both, distance)


def _close_distance(a: Factors, b: Factors) -> float:
    if torch.equal(a[1], b[1]):
        return product_norm((a[0] - b[0], a[1]))
    if torch.equal(a[0], b[0]):
        return product_norm((a[0], a[1] - b[1]))
    return float(product_distance(balanced(a), balanced(b)))


# --- matrices in whichever form they have ----------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """One matrix: as a Kronecker product, as a product of thin factors, and `in_blocks`."""

    kron: Factors | None
    product: Factors | None
    blocks: Callable[[], Iterator[Tensor]]
    norm: Callable[[], float]


def in_blocks(rows: int, made: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
    """A matrix in blocks of rows, of which `made` gives any."""
    step = 1
    start = 0
    while start < rows:
        block = made(start, min(rows, start + step))
        yield block
        start += block.shape[-2]
        step = max(1, BLOCK // max(1, block.shape[-1]))


def wide_blocks(
    rows: int,
    kron: Factors | None,
    factors: Callable[[], Factors | None],
    whole: Callable[[], Tensor],
) -> Iterator[Tensor]:
    """A matrix in float64, in blocks of rows, by the first of these forms that it has."""
    if kron is not None:
        one, two = kron[0].double(), kron[1].double()
        return in_blocks(rows, lambda start, stop: kron_rows(one, two, start, stop))
    pair = factors()
    # a matrix beside an identity is the product
    delta = whole() if pair is None else _beside_identity(*pair)
    if pair is not None and delta is None:
        left, right = pair[0], pair[1].double()
        return in_blocks(rows, lambda start, stop: left[..., start:stop, :].double() @ right)
    assert delta is not None
    return in_blocks(rows, lambda start, stop: delta[..., start:stop, :].double())


def _beside_identity(left: Tensor, right: Tensor) -> Tensor | None:
    """left · right if one of them is an identity."""
    if _is_identity(left):
        return right
    return left if _is_identity(right) else None


def _is_identity(x: Tensor) -> bool:
    if x.ndim != 2 or x.shape[0] != x.shape[1] or int(x.count_nonzero()) != len(x):
        return False
    return bool((x.diagonal() == 1).all())


def inner(one: Operand, two: Operand) -> float:
    """⟨A, B⟩_F, by the cheapest forms that both have."""
    if _same_blocks(one, two):
        assert one.kron is not None
        assert two.kron is not None
        (a, b), (c, d) = one.kron, two.kron
        return float((a * c).sum() * (b * d).sum())
    for kron, product in ((one.kron, two.product), (two.kron, one.product)):
        if kron is not None and product is not None:
            return kron_product_inner(kron, product)
    if one.product is not None and two.product is not None:
        return float(product_inner(one.product, two.product))
    return sum(float((a * b).sum()) for a, b in zip(one.blocks(), two.blocks(), strict=True))


def distance_squared(one: Operand, two: Operand, norm: float | None = None) -> float:
    """‖A − B‖²_F, by the cheapest forms that both have. `norm` is ‖A‖² if it is known.

    Exact to machine precision of the norms if both are products or have equal blocks.
    """
    if _same_blocks(one, two):
        assert one.kron is not None
        assert two.kron is not None
        return float(product_distance(rearranged(one.kron), rearranged(two.kron)))
    if one.product is not None and two.product is not None:
        return float(product_distance(one.product, two.product, norm))
    for kron, product in ((one.kron, two.product), (two.kron, one.product)):
        if kron is not None and product is not None:
            total = one.norm() + two.norm()
            found = total - 2.0 * kron_product_inner(kron, product)
            if found > CANCELLED * total:
                return found
    pairs = zip(one.blocks(), two.blocks(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


def _same_blocks(one: Operand, two: Operand) -> bool:
    """Whether both are Kronecker products whose blocks have the same size."""
    pair = one.kron, two.kron
    return pair[0] is not None and pair[1] is not None and pair[0][0].shape == pair[1][0].shape
