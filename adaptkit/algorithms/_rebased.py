"""A LoRA whose training subtracted a part of the base weight first (PEFT's PiSSA and OLoRA)."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Unwritten
from adaptkit.algorithms._record import record
from adaptkit.algorithms._start import with_product
from adaptkit.algorithms._wrapping import Wrapping
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms._stored import Facts, Role, Shapes, Stated
    from adaptkit.algorithms.contract import Weights

__all__ = ["Rebased"]


@record
class Rebased(Unwritten, Wrapping):
    """W' = W + scale · up · down − taken(W): what the first factors held is not in the base.

    The tensors are those of a LoRA; only PEFT's `init_lora_weights` tells, so it has no forms. It
    is read, applied and converted to a plain difference, and never written. As a kind it is named
    after both, `lora+pissa`.
    """

    wraps: ClassVar[tuple[str, ...]] = ("lora",)
    roles: ClassVar[Mapping[str, Role]] = MappingProxyType({})

    inner: Weights
    scale: float

    @classmethod
    def around(cls, inner: type[Weights]) -> Mapping[str, Any]:
        return {"title": f"{inner.title}, {cls.title}"}

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        return cls.kind.facts(shapes, alpha)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(cls.kind.decode(tensors, facts), facts.scale)

    @classmethod
    def _unwritten(cls) -> NotRepresentable:
        return NotRepresentable(
            f"a {cls.title} means something else where init_lora_weights is not read",
            hint="--algo lora with --base CHECKPOINT writes the plain difference",
        )

    def delta(self) -> Tensor:
        raise NotRepresentable(
            f"what a {self.title} changes depends on the weight it was trained from",
            hint="give that checkpoint with --base",
        )

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        left, right = (factor.to(base.dtype) for factor in self.inner.factors())
        one, two = self.taken(base, int(left.shape[-1]))
        sides = torch.cat([left, -one], -1), torch.cat([right, two], -2)
        return with_product(base, *sides, strength)

    def taken(self, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """What the first factors of this rank held of W, as a product (..., m, r) · (..., r, n)."""
        raise NotImplementedError
