"""Weights of a layer whose file has the two halves of its rows in the other order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from adaptkit.algorithms._record import record
from adaptkit.algorithms.contract import Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Exchanged", "with_halves_exchanged"]

BLOCK = 1 << 18  # entries of a block of rows


@record
class Exchanged(Weights):
    """What `inner` does to the weight with its halves exchanged, for kinds that cannot be.

    Some layers store their scale and shift in the other order than their model.
    """

    name: ClassVar[str] = "exchanged"
    title: ClassVar[str] = "exchanged halves"

    inner: Weights

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether ΔW does not depend on the weight."""
        return self.inner.additive

    @property
    def rows(self) -> int:
        return self.inner.rows

    def delta(self) -> Tensor:
        whole = self.inner.delta()
        return whole.roll(whole.shape[-2] // 2, -2)

    def factors(self) -> tuple[Tensor, Tensor]:
        left, right = self.inner.factors()
        return left.roll(left.shape[-2] // 2, -2), right

    def apply(self, base: Tensor, strength: float) -> Tensor:
        return _exchange(self.inner.apply(_exchange(base), strength))

    def on_bias(self, weight: Tensor) -> Any:
        return Exchanged(self.inner.on_bias(_exchange(weight.clone())))

    def times(self, factor: float) -> Exchanged:
        return Exchanged(self.inner.times(factor))

    def swapped(self) -> Any:
        return self.inner


def with_halves_exchanged(weights: Weights) -> Weights:
    """The weights with the two halves of their rows exchanged, of their own kind if it can be."""
    try:
        return weights.swapped()
    except NotRepresentable:
        return Exchanged(weights)


def _exchange(matrix: Tensor) -> Tensor:
    """Exchange the halves of the rows of (..., m, n) in its own memory, a block at a time."""
    half = matrix.shape[-2] // 2
    step = max(1, BLOCK // max(1, matrix.numel() // max(1, matrix.shape[-2])))
    for start in range(0, half, step):
        above = matrix[..., start : min(start + step, half), :]
        below = matrix[..., half + start : half + min(start + step, half), :]
        held = above.clone()
        above.copy_(below)
        below.copy_(held)
    return matrix
