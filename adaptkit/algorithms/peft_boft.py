"""BOFT of PEFT: butterfly stages of small rotations of the columns, then factors of the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._parts import same
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._rotation import cayley, toward
from adaptkit.algorithms._stored import SCRATCH, matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class PeftBoft(Weights):
    """W' = factor · W · (B_m ⋯ B_1)ᵀ.   blocks: (..., m, n, b, b)   factor: (..., rows, 1)

    columns = n·b. Stage i pairs runs of b/2 columns that lie 2ⁱ·b/2 apart and turns each pair by
    R = (I − Q)(I + Q)⁻¹ with Q = (B − Bᵀ)/2 (huggingface/peft `tuners/boft/layer.py`, checked with
    0.21.2). The columns of a convolution are its inputs with their kernel positions, as in
    `flatten(1)`. `factor` is stored `[rows, 1]`, for a convolution `[1, rows]`.
    """

    name: ClassVar[str] = "peft-boft"
    title: ClassVar[str] = "BOFT of PEFT"
    peft_type: ClassVar[str] = "BOFT"
    peft_kept: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(blocks=Role("boft_R"), factor=Role("boft_s"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"blocks", "factor"}),)

    blocks: Tensor
    factor: Tensor
    column: bool = True  # stored [rows, 1]
    turns: Tensor | None = None  # R of the blocks, once they are computed

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        blocks, factor = shapes["blocks"], shapes["factor"]
        fits = (
            len(blocks) == 4 and blocks[2] == blocks[3] and (blocks[0] == 1 or blocks[2] % 2 == 0)
        )
        matched(fits and blocks[1] % 2 ** (blocks[0] - 1) == 0, "blocks", shapes)
        matched(len(factor) == 2 and 1 in factor, "factor", shapes)
        return Facts(math.prod(factor), blocks[1] * blocks[2], None, None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        blocks, factor = tensors["blocks"], tensors["factor"]
        return cls(blocks, factor.reshape(*factor.shape[:-2], facts.rows, 1), factor.shape[-1] == 1)

    def encode(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks, "factor": self.factor if self.column else self.factor.mT}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The number or the size of blocks stays as the source states it."""
        stages, counts, sizes, _ = zip(*(m.shapes["blocks"] for m in modules), strict=True)
        found = {"boft_n_butterfly_factor": one_for_all("butterfly factors", stages)}
        if modules[0].config.keys() & {"boft_block_size", "boft_block_num"}:
            return found
        if len(set(sizes)) == 1:
            return {**found, "boft_block_size": sizes[0], "boft_block_num": 0}
        number = one_for_all("the number of blocks", counts)
        return {**found, "boft_block_size": 0, "boft_block_num": number}

    @property
    def rows(self) -> int:
        return int(self.factor.shape[-2])

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a rotation changes depends on the weight", hint="merge it into its checkpoint"
        )

    def computed(self) -> Self:
        return replace(self, turns=cayley(self.blocks * -0.5))

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 24 * min(rows * columns, SCRATCH)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        *_, stages, _, b, _ = self.blocks.shape
        turns = cayley(self.blocks * -0.5) if self.turns is None else self.turns
        turns = turns.to(base.dtype)
        merged = base
        for stage in range(stages):
            # two runs of b/2 columns, 2^stage runs apart, make a block; first they are neighbours
            runs = (2, 2**stage, b // 2) if stage else (1, 1, b)
            cut = merged.reshape(*base.shape[:-1], -1, *runs).transpose(-2, -3)
            blocks = cut.reshape(*base.shape[:-1], -1, b).transpose(-2, -3)  # (..., n, rows, b)
            turned = (blocks @ turns[..., stage, :, :, :].mT).transpose(-2, -3)
            merged = turned.reshape(cut.shape).transpose(-2, -3).reshape(base.shape)
        return toward(base, merged * self.factor.to(base.dtype), strength)

    def folded(self) -> Self:
        return self

    def part(self, start: int, stop: int) -> Self:
        return replace(self, factor=self.factor[..., start:stop, :])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Exact for parts with the same rotation of the columns."""
        import torch

        if not all(same(part.blocks, parts[0].blocks) for part in parts):
            raise NotRepresentable(
                "rows whose columns are turned differently cannot be fused",
                hint="merge them into their checkpoint",
            )
        return replace(parts[0], factor=torch.cat([part.factor for part in parts], -2))


ALGORITHM = PeftBoft
