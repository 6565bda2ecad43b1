"""BOFT: butterfly stages of small rotations over the output rows, then perhaps a rescaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._rotation import cayley, toward
from adaptkit.algorithms._weights import ALPHA, Facts, Role, Shapes, Stated, Weights, matched, roles
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Boft(Weights):
    """W' = rescale · B_m ⋯ B_1 W.   blocks: (..., m, n, b, b), rows = n·b   rescale: (..., rows, 1)

    Stage i groups rows 2ⁱ·b/2 apart and turns each group of b by R = (I + Q)(I − Q)⁻¹, Q = B − Bᵀ, the norm of all Q
    together bounded by alpha · rows where alpha is not 0 (Liu et al., arXiv:2311.06243; LyCORIS 4.1.3
    `functional/boft.py`).
    """

    name: ClassVar[str] = "boft"
    title: ClassVar[str] = "BOFT"
    additive: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(blocks=Role("oft_blocks"), rescale=Role("rescale"), alpha=Role(ALPHA))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"blocks"}), frozenset({"blocks", "rescale"}))

    blocks: Tensor
    bound: float = 0.0
    rescale: Tensor | None = None
    stored: tuple[int, ...] = ()  # the shape of `rescale` in the file

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        blocks = shapes["blocks"]
        matched(len(blocks) == 4 and blocks[2] == blocks[3], "blocks", shapes)
        rows = blocks[1] * blocks[2]
        matched("rescale" not in shapes or shapes["rescale"][0] == rows, "blocks rescale", shapes)
        return Facts(rows, 0, None, None, alpha.value if alpha else 0.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        blocks, rescale = tensors["blocks"], tensors.get("rescale")
        batch = blocks.shape[:-4]
        column = None if rescale is None else rescale.reshape(*batch, facts.rows, 1)
        own = () if rescale is None else tuple(rescale.shape[len(batch) :])
        return cls(blocks, facts.scale, column, own)

    def encode(self) -> dict[str, Tensor]:
        import torch

        found = {"blocks": self.blocks, ALPHA: torch.tensor(self.bound, dtype=torch.float32)}
        if self.rescale is not None:
            found["rescale"] = self.rescale.reshape(*self.rescale.shape[:-2], *self.stored)
        return found

    @property
    def rows(self) -> int:
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    def _bound(self) -> float:
        """What the norm of all generators together may be: alpha times the rows, and anything where alpha is 0."""
        return self.bound * self.rows if self.bound > 0 else math.inf

    def delta(self) -> Tensor:
        raise NotRepresentable("what a rotation changes depends on the weight", hint="merge it into its checkpoint")

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        many = self.blocks.reshape(-1, *self.blocks.shape[-4:])
        weights = base.reshape(-1, *base.shape[-2:])
        merged = torch.stack([self._turned(one, weight) for one, weight in zip(many, weights, strict=True)])
        merged = merged.reshape(base.shape)
        if self.rescale is not None:
            merged = merged * self.rescale.to(base.dtype)
        return toward(base, merged, strength)

    def _turned(self, blocks: Tensor, weight: Tensor) -> Tensor:
        """All stages over the rows of one weight (rows, columns)."""
        b = blocks.shape[-1]
        turns = cayley(blocks, self._bound()).to(weight.dtype)
        for stage, turn in enumerate(turns):
            apart = 2**stage * (b // 2)
            grouped = weight.reshape(-1, 2, apart, weight.shape[-1]).transpose(1, 2).reshape(-1, b, weight.shape[-1])
            turned = (turn @ grouped).reshape(-1, apart, 2, weight.shape[-1])
            weight = turned.transpose(1, 2).reshape(weight.shape)
        return weight

    def folded(self) -> Self:
        return self


ALGORITHM = Boft
