"""full: the difference itself, of a matrix, a bias or a norm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, FitSpec, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable
from adaptkit.names import BIAS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor


@record
class Full(Weights):
    """ΔW = diff (..., m, n). A bias or the vector of a norm is a column, (..., m, 1). No scale.

    Stored as `diff` and `diff_b` for layers, as `w_norm` and `b_norm` for norms (LyCORIS
    `modules/full.py`, `norms.py`). Only PEFT's `lora_B.bias` has a scale, that of its factors.
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full difference"
    dense: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    extractable: ClassVar[bool] = True
    resized: ClassVar[str | None] = "lora"
    roles: ClassVar[Mapping[str, Role]] = roles(
        # LightX2V's extraction for Wan, read by ComfyUI-WanVideoWrapper
        diff=Role("diff", inside=(("diff_m", "modulation"),)),
        diff_b=Role("diff_b", ("lora_B.bias",), param=BIAS),
        w_norm=Role("w_norm"),
        b_norm=Role("b_norm", param=BIAS),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = tuple(frozenset({role}) for role in roles)

    diff: Tensor
    kernel: tuple[int, ...] = ()
    role: str = "diff"
    vector: bool = False

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        ((role, shape),) = shapes.items()
        # a bias is a vector; all else may be one
        fits = len(shape) == 1 or (len(shape) > 1 and cls.roles[role].param != BIAS)
        matched(fits, role, shapes)
        return Facts(shape[0], math.prod(shape[1:]), shape[2:], None, 1.0, vector=len(shape) == 1)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        ((role, stored),) = tensors.items()
        own = 1 if facts.vector else 2 + len(facts.kernel or ())
        matrix = stored.reshape(*stored.shape[: stored.ndim - own], facts.rows, facts.columns)
        if facts.scale != 1.0:
            from adaptkit.linalg.precision import upcast

            matrix = upcast(matrix) * facts.scale
        return cls(matrix, facts.kernel or (), role, facts.vector)

    def encode(self) -> dict[str, Tensor]:
        rows = self.diff.shape[:-1]
        return {self.role: self.diff.reshape(rows if self.vector else (*rows, -1, *self.kernel))}

    def _wide_blocks(self) -> Iterator[Tensor]:
        from adaptkit.linalg.products import in_blocks

        return in_blocks(self.rows, lambda start, stop: self.diff[..., start:stop, :].double())

    def delta(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.diff)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        return base.add_(self.diff, alpha=strength)

    def times(self, factor: float) -> Self:
        return replace(self, diff=self.delta() * factor)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, diff=self.diff[..., start:stop, :])

    @classmethod
    def vector_role(cls, *, bias: bool, norm: bool) -> str | None:
        return ("b_norm" if bias else "w_norm") if norm else "diff_b"

    def placed(self, role: str, *, vector: bool) -> Self:
        return replace(self, role=role, vector=vector)

    @classmethod
    def holding(cls, delta: Tensor, kernel: tuple[int, ...]) -> Self:
        return cls(delta, kernel)

    @property
    def rows(self) -> int:
        return int(self.diff.shape[-2])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        import torch

        return replace(parts[0], diff=torch.cat([part.diff for part in parts], -2))

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        return replace(
            like, diff=like.diff.new_zeros(*like.diff.shape[:-2], rows, like.diff.shape[-1])
        )

    def folded(self) -> Self:
        return self

    @classmethod
    def sum(cls, parts: Sequence[Self]) -> Self:
        total = parts[0].delta()
        for part in parts[1:]:
            total = total + part.delta()
        return replace(parts[0], diff=total)

    @classmethod
    def exactly(cls, weights: Weights, kernel: tuple[int, ...] | None) -> Self:
        """ΔW itself, in float32."""
        if kernel is None:
            raise NotRepresentable(
                "the stored shapes do not tell the kernel size that a full difference has to state"
            )
        return cls(weights.delta(), kernel)

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """The difference itself, not a copy."""
        return cls(delta, spec.kernel)


ALGORITHM = Full
