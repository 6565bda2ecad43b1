"""HRA: the columns of the weight are reflected, one reflection after another."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class Hra(OfPeft, Applied):
    """W' = W (I − 2 u₁u₁ᵀ) ⋯ (I − 2 u_r u_rᵀ), with u the normed columns of `vectors` (..., n, r).

    With `orthogonal` (PEFT's `apply_GS`) they are made orthogonal first, as Gram and Schmidt do
    (Yuan et al., arXiv:2405.17484; huggingface/peft `tuners/hra/layer.py`, checked with 0.21.2).
    The columns of a convolution are its inputs with their kernel positions, as in `flatten(1)`.
    """

    name: ClassVar[str] = "hra"
    title: ClassVar[str] = "HRA"
    peft_type: ClassVar[str] = "HRA"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"apply_GS": False})
    row_wise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(vectors=Role("hra_u"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"vectors"}),)

    vectors: Tensor
    orthogonal: bool = False

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["vectors"]
        matched(len(shape) == 2 and 0 < shape[1] <= shape[0], "vectors", shapes)
        return Facts(0, shape[0], None, shape[1], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        return replace(facts, settings=(bool(cls.stated(wanted)["apply_GS"]),))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["vectors"], bool(facts.settings[0]))

    def encode(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return counted(modules, "r")

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        units = self.vectors.to(base.dtype)
        self._fitting(units.shape[-2] == base.shape[-1], base)
        if self.orthogonal:
            # the span is what counts: QR spans it as Gram and Schmidt do, with less rounding
            q = torch.linalg.qr(units).Q
            return base.sub_((base @ q) @ q.mT, alpha=2.0 * strength)
        units = units / torch.linalg.vector_norm(units, dim=-2, keepdim=True)
        turned = base if strength == 1.0 else base.clone()
        for n in range(units.shape[-1]):
            unit = units[..., n : n + 1]
            turned.sub_((turned @ unit) @ unit.mT, alpha=2.0)
        return turned if turned is base else toward(base, turned, strength)

    def part(self, start: int, stop: int) -> Self:
        """The columns turn alike in all rows."""
        return self

    def swapped(self) -> Self:
        return self


ALGORITHM = Hra
