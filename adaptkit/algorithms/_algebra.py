"""Inner products and distances of weights of any two kinds, in float64, without ΔW wherever factors allow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.algorithms.contract import Weights

__all__ = ["distance_squared", "inner"]

Factors = tuple["Tensor", "Tensor"]

CANCELLED = 1e-10  # of the norms: below it the sum of three terms has lost too many digits


def inner(one: Weights, two: Weights) -> float:
    """⟨ΔW, ΔW'⟩_F; NotRepresentable where one of them depends on the weight it is applied to."""
    from adaptkit.linalg.factored import product_inner

    krons = one.kron_factors(), two.kron_factors()
    if krons[0] is not None and krons[1] is not None and krons[0][0].shape == krons[1][0].shape:
        (a, b), (c, d) = (tuple(t.double() for t in kron) for kron in krons if kron)
        return float((a * c).sum() * (b * d).sum())
    factors = _thin(one), _thin(two)
    for kron, other in ((krons[0], factors[1]), (krons[1], factors[0])):
        if kron is not None and other is not None:
            return _kron_with_product(kron, other)
    if factors[0] is not None and factors[1] is not None:
        return float(product_inner(factors[0], factors[1]))
    return float((_dense(one) * _dense(two)).sum())


def distance_squared(one: Weights, two: Weights, norm: float | None = None) -> float:
    """‖ΔW − ΔW'‖²_F, to machine precision of the norms where both have thin factors or equal Kronecker blocks.

    `norm` is ‖ΔW‖², where it is known already.
    """
    from adaptkit.linalg.factored import product_distance

    krons = one.kron_factors(), two.kron_factors()
    if krons[0] is not None and krons[1] is not None and krons[0][0].shape == krons[1][0].shape:
        # rearranged, a Kronecker product is vec(w1) vec(w2)ᵀ (Van Loan and Pitsianis 1993): a product of rank 1
        flat = [
            (kron[0].double().reshape(-1, 1), kron[1].double().reshape(1, -1))
            for kron in krons
            if kron
        ]
        return float(product_distance(flat[0], flat[1]))
    factors = _thin(one), _thin(two)
    if factors[0] is not None and factors[1] is not None:
        return float(product_distance(factors[0], factors[1], norm))
    for kron, other in ((krons[0], factors[1]), (krons[1], factors[0])):
        if kron is not None and other is not None:
            total = one.norm_squared() + two.norm_squared()
            found = total - 2.0 * _kron_with_product(kron, other)
            if found > CANCELLED * total:
                return found
    return float((_dense(one) - _dense(two)).square().sum())


def _dense(weights: Weights) -> Tensor:
    """ΔW in float64, also where the weights compute in float32: its rounding would be taken for a difference."""
    from adaptkit.linalg.kron import kron

    if (pair := weights.kron_factors()) is not None:
        return kron(pair[0].double(), pair[1].double())
    try:
        left, right = weights.factors()
    except NotRepresentable:
        return weights.delta().double()
    return left.double() @ right.double()


def _thin(weights: Weights) -> Factors | None:
    if weights.kron_factors() is not None:
        return None
    thin = weights.thin_factors()
    return None if thin is None else (thin[0].double(), thin[1].double())


def _kron_with_product(kron: Factors, factors: Factors) -> float:
    """⟨w1 ⊗ w2, left · right⟩ = Σ_p ⟨w1, Uₚ w2 Vₚᵀ⟩, Uₚ and Vₚ being column p of left and row p of right, folded."""
    w1, w2 = kron[0].double(), kron[1].double()
    left, right = factors
    rank = left.shape[-1]
    u = left.mT.reshape(rank, w1.shape[0], w2.shape[0])
    v = right.reshape(rank, w1.shape[1], w2.shape[1])
    return float(((u @ w2 @ v.mT) * w1).sum())
