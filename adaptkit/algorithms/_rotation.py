"""Rotations from stored blocks, shared by the orthogonal kinds.

Their alpha is not a scale: it bounds the norm of the generators. `Facts.scale` carries it as it is
stored.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = ["COLUMNS", "Rotation", "cayley", "column_blocks", "toward"]


COLUMNS = 1 << 20  # entries of a weight turned at a time


@record
class Rotation(Weights):
    """Output rows turned by stored blocks, then perhaps rescaled (OFT and BOFT of LyCORIS).

    blocks: (..., n, b, b), or (..., stages, n, b, b) if `dims` is 4; rows = n·b
    rescale: (..., rows, 1)
    """

    additive: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    turn_copies: ClassVar[float] = 1.7  # float32 copies of the columns that are turned at a time
    dims: ClassVar[int]  # dimensions of the stored blocks; they differ between the kinds
    roles: ClassVar[Mapping[str, Role]] = roles(
        blocks=Role("oft_blocks"), rescale=Role("rescale"), alpha=Role(ALPHA)
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"blocks"}),
        frozenset({"blocks", "rescale"}),
    )

    blocks: Tensor
    bound: float = 0.0
    rescale: Tensor | None = None
    stored: tuple[int, ...] = ()  # the shape of `rescale` in the file

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        blocks = shapes["blocks"]
        matched(len(blocks) == cls.dims and blocks[-1] == blocks[-2], "blocks", shapes)
        rows = blocks[-3] * blocks[-2]
        matched("rescale" not in shapes or shapes["rescale"][0] == rows, "blocks rescale", shapes)
        return Facts(rows, 0, None, None, alpha.value if alpha else 0.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        blocks, rescale = tensors["blocks"], tensors.get("rescale")
        batch = blocks.shape[: -cls.dims]
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

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a rotation changes depends on the weight", hint="merge it into its checkpoint"
        )

    def turned(self, turns: Tensor, weight: Tensor) -> Tensor:
        """Columns (rows, k) of one weight with their rows turned, by R of its blocks."""
        raise NotImplementedError

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return int(4 * cls.turn_copies * min(rows * columns, COLUMNS))

    def apply(self, base: Tensor, strength: float) -> Tensor:
        # the bound on the norm of all generators together; alpha 0 means none
        bound = self.bound * self.rows if self.bound > 0 else math.inf
        many = self.blocks.reshape(-1, *self.blocks.shape[-self.dims :])
        scales = None if self.rescale is None else self.rescale.reshape(len(many), -1, 1)
        whole = base if base.ndim == 3 else base.reshape(-1, *base.shape[-2:])
        for n, weight in enumerate(whole):
            turns = cayley(many[n], bound).to(base.dtype)
            for columns in column_blocks(base):
                part = weight[:, columns]
                turned = self.turned(turns, part)
                if scales is not None:
                    turned = turned * scales[n].to(base.dtype)
                part.copy_(toward(part, turned, strength))
        return base if whole is base else whole.reshape(base.shape)

    def folded(self) -> Self:
        return self


def column_blocks(base: Tensor) -> Iterator[slice]:
    """Columns of W (..., m, n): they turn by themselves, and a part at a time takes no copy."""
    step = max(1, COLUMNS // max(1, base.shape[-2]))
    for start in range(0, base.shape[-1], step):
        yield slice(start, min(start + step, base.shape[-1]))


def cayley(blocks: Tensor, bound: float = math.inf) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ of every block B (..., b, b), in float32 or wider.

    If the norm of Q over all blocks together exceeds `bound`, Q is scaled down to it (LyCORIS
    `modules/diag_oft.py: get_r`, sd-scripts `networks/oft.py`). So with a bound, the blocks must
    be those of one weight.
    """
    import torch

    from adaptkit.linalg.precision import upcast

    wide = upcast(blocks)
    generator = wide - wide.mT
    if bound < math.inf:
        norm = torch.linalg.vector_norm(generator) + 1e-8
        generator = generator * torch.clamp(bound / norm, max=1.0)
    eye = torch.eye(blocks.shape[-1], dtype=wide.dtype, device=wide.device)
    turned: Tensor = torch.linalg.solve(eye - generator, eye + generator, left=False)
    return turned


def toward(base: Tensor, merged: Tensor, strength: float) -> Tensor:
    """W + strength · (W' − W), written into `base`: the strength of non-additive kinds."""
    return base.copy_(merged) if strength == 1.0 else base.lerp_(merged, strength)
