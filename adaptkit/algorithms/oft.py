"""OFT (LyCORIS' DiagOFT): blocks of output rows are rotated, then perhaps rescaled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import Rotation
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@record
class Oft(Rotation):
    """W' = rescale · blockdiag(R)ᵀ W.   blocks: (..., n, b, b)   rescale: (..., rows, 1)

    rows = n·b. R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ, whose norm is bounded by alpha · rows unless
    alpha is 0 (Qiu et al., arXiv:2306.07280; LyCORIS 4.1.3 `modules/diag_oft.py`).
    """

    name: ClassVar[str] = "oft"
    title: ClassVar[str] = "OFT (DiagOFT)"
    dims: ClassVar[int] = 3

    def turned(self, turns: Tensor, weight: Tensor) -> Tensor:
        cut = weight.reshape(*turns.shape[:2], weight.shape[-1])
        return (turns.mT @ cut).reshape(weight.shape)

    def part(self, start: int, stop: int) -> Self:
        """Exact if the cut falls between blocks and no bound ties them together."""
        b = self.blocks.shape[-1]
        if start % b or stop % b or self.bound > 0:
            raise NotRepresentable(
                f"rows {start} to {stop} cut through a block of {b} rows that rotate together"
            )
        rescale = None if self.rescale is None else self.rescale[..., start:stop, :]
        stored = (stop - start, *self.stored[1:]) if self.stored else ()
        return replace(
            self,
            blocks=self.blocks[..., start // b : stop // b, :, :],
            rescale=rescale,
            stored=stored,
        )

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Exact for blocks of one size that no bound ties together."""
        import torch

        if len({part.blocks.shape[-1] for part in parts}) > 1 or any(
            part.bound > 0 for part in parts
        ):
            raise NotRepresentable(
                "OFT with blocks of different sizes, or with a bound on each, cannot be fused",
                hint="merge them into their checkpoint",
            )
        blocks = torch.cat([part.blocks for part in parts], -3)
        scaled = next((part for part in parts if part.rescale is not None), None)
        if scaled is None:
            return replace(parts[0], blocks=blocks)
        rescale = torch.cat([part._factors(scaled.rescale) for part in parts], -2)
        return replace(
            parts[0], blocks=blocks, rescale=rescale, stored=(rescale.shape[-2], *scaled.stored[1:])
        )

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        """Rows that are not turned: blocks of zeros."""
        b = like.blocks.shape[-1]
        if rows % b:
            raise NotRepresentable(f"{rows} missing rows are no multiple of a block of {b}")
        blocks = like.blocks.new_zeros(*like.blocks.shape[:-3], rows // b, b, b)
        return replace(like, blocks=blocks, rescale=None, stored=())

    def swapped(self) -> Self:
        """Whole blocks change places; a bound on all of them still holds."""
        rows, b = self.rows, self.blocks.shape[-1]
        if rows // 2 % b:
            raise NotRepresentable(
                f"the middle of {rows} rows cuts through a block of {b} rows that rotate together"
            )
        rescale = None if self.rescale is None else self.rescale.roll(rows // 2, -2)
        return replace(self, blocks=self.blocks.roll(rows // 2 // b, -3), rescale=rescale)

    def _factors(self, like: Tensor | None) -> Tensor:
        """The rescaling of every row, 1 without one."""
        if self.rescale is not None:
            return self.rescale
        assert like is not None
        return like.new_ones(*self.blocks.shape[:-3], self.rows, 1)


ALGORITHM = Oft
