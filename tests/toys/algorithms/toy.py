"""A toy algorithm: ΔW is an outer product of two vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, FitSpec, Role, Shapes, Stated, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Toy(Weights):
    """ΔW = column · row.   column: (..., m, 1)   row: (..., 1, n)"""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "toy"
    extractable: ClassVar[bool] = True
    resized: ClassVar[str | None] = "lora"
    roles: ClassVar[Mapping[str, Role]] = roles(column=Role("toy_column"), row=Role("toy_row"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"column", "row"}),)

    column: Tensor
    row: Tensor
    kernel: tuple[int, ...] = ()

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        column, row = shapes["column"], shapes["row"]
        matched(column[1:] == (1,) and row[0] == 1, "column row", shapes)
        return Facts(column[0], math.prod(row), row[2:], None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        row = tensors["row"]
        flat = row.reshape(*row.shape[: row.ndim - 2 - len(facts.kernel or ())], 1, -1)
        return cls(tensors["column"], flat, facts.kernel or ())

    def encode(self) -> dict[str, Tensor]:
        row = self.row.reshape(*self.row.shape[:-1], -1, *self.kernel)
        return {"column": self.column, "row": row}

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        from adaptkit.linalg.precision import upcast

        return upcast(self.column), upcast(self.row)

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        return 1

    def folded(self) -> Self:
        return self

    def times(self, factor: float) -> Self:
        return replace(self, column=self.column * factor)

    @classmethod
    def fitted_numbers(cls, rows: int, columns: int, rank: int | None) -> int:
        return rows + columns

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

        return cls(*truncated_svd(delta, SvdSpec(1)).balanced(), spec.kernel)


ALGORITHM = Toy
