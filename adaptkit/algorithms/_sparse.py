"""Differences of which a few entries are stored, by their places in the weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sparse"]


class Sparse(OfPeft, Applied):
    """ΔW = scale · S, the entries of S at some places being `entries` (..., k), all others 0.

    The size of the weight is not in the tensors, so it is applied to the weight.
    """

    linear: ClassVar[bool] = True

    entries: Tensor

    @property
    def scale(self) -> float:
        """What multiplies S."""
        return 1.0

    def places(self, base: Tensor) -> Tensor:
        """The places of the entries in the flattened weight, (k,) or (..., k) like `base`."""
        raise NotImplementedError

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 20 * rows * columns  # a permutation of the weight, and S

    def spread(self, base: Tensor) -> Tensor:
        """S in the dtype and shape of the weight. Entries of one place are added up."""
        places = self.places(base)
        numbers = base.shape[-2] * base.shape[-1]
        inside = not places.numel() or (int(places.min()) >= 0 and int(places.max()) < numbers)
        self._fitting(inside, base)
        flat = base.new_zeros(*base.shape[:-2], numbers)
        entries = self.entries.to(base.dtype)
        flat.scatter_add_(-1, places.to(base.device).expand_as(entries), entries)
        return flat.reshape(base.shape)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        return base.add_(self.spread(base), alpha=strength * self.scale)

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        scaled: Tensor = upcast(self.entries) * factor
        return replace(self, entries=scaled)  # type: ignore[type-var]
