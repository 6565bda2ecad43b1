"""Weights that replace those of the base, under any name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import matched
from adaptkit.algorithms.contract import Facts, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["Replaced"]


@record
class Replaced(Weights):
    """W' = value (..., m, n); a vector is a column, (..., m, 1). It is stored under one role."""

    additive: ClassVar[bool] = False

    value: Tensor
    kernel: tuple[int, ...] = ()
    vector: bool = False
    role: str = "value"

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        ((role, shape),) = shapes.items()
        matched(len(shape) >= 1, role, shapes)
        columns, vector = math.prod(shape[1:]), len(shape) == 1
        return Facts(shape[0], columns, shape[2:], None, 1.0, vector=vector)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        ((role, stored),) = tensors.items()
        own = 1 if facts.vector else 2 + len(facts.kernel or ())
        matrix = stored.reshape(*stored.shape[: stored.ndim - own], facts.rows, facts.columns)
        return cls(matrix, facts.kernel or (), facts.vector, role)

    def encode(self) -> dict[str, Tensor]:
        rows = self.value.shape[:-1]
        shape = rows if self.vector else (*rows, -1, *self.kernel)
        return {self.role: self.value.reshape(shape)}

    @property
    def rows(self) -> int:
        return int(self.value.shape[-2])

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a replaced weight changes depends on the one it replaces", hint="merge it"
        )

    def apply(self, base: Tensor, strength: float) -> Tensor:
        return toward(base, self.value.to(base.dtype), strength)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, value=self.value[..., start:stop, :])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        import torch

        return replace(parts[0], value=torch.cat([part.value for part in parts], -2))

    def folded(self) -> Self:
        return self
