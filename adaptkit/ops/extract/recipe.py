"""How a layer is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import FitSpec, Weights

__all__ = ["FitRecipe"]


@dataclass(frozen=True)
class FitRecipe:
    """How to fit one layer: by weights of `kind`.

    With `ladder`, any lower rank may be chosen afterwards. `looked` at the layer, what a LoRA of as
    many numbers would keep is measured too.
    """

    kind: type[Weights]
    spec: FitSpec
    ladder: bool = False
    looked: bool = True

    @property
    def compared(self) -> bool:
        """Whether to report what a LoRA of as many numbers would keep."""
        return self.kind.against_low_rank and not self.ladder and self.looked
