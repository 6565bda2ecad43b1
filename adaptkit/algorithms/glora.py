"""GLoRA: a low-rank difference, and one that multiplies the base weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._parts import same
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import SCRATCH, flat, matched, roles, scaling
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@record
class Glora(Weights):
    """ΔW = scale · (b1 b2 + W a1 a2).

    a1: (..., i, r)   a2: (..., r, i)   b1: (..., m, r)   b2: (..., r, i·K)

    scale is alpha / rank. In a convolution a1 and a2 act on the inputs alike at every kernel
    position (Chavan et al., arXiv:2306.07967; LyCORIS `modules/glora.py`, its forward pass).
    """

    name: ClassVar[str] = "glora"
    title: ClassVar[str] = "GLoRA"
    row_wise: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, Role]] = roles(
        **{role: Role(f"{role}.weight") for role in ("a1", "a2", "b1", "b2")}, alpha=Role(ALPHA)
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"a1", "a2", "b1", "b2"}),)

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    scale: float
    kernel: tuple[int, ...] = ()

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        a1, a2, b1, b2 = (shapes[role] for role in ("a1", "a2", "b1", "b2"))
        alike = all(len(shape) == len(b2) for shape in (a1, a2, b1))
        matched(len(b2) >= 2 and alike, "a1 a2 b1 b2", shapes)
        rank = b2[0]
        fits = rank > 0 and b1[1] == rank and a1[1] == a2[0] and a1[0] == a2[1] == b2[1]
        matched(
            fits and all(n == 1 for shape in (a1, a2, b1) for n in shape[2:]), "a1 a2 b1 b2", shapes
        )
        return Facts(b1[0], math.prod(b2[1:]), b2[2:], rank, scaling(alpha, rank))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        kernel = facts.kernel or ()
        parts = {role: flat(tensors[role], 2 + len(kernel)) for role in ("a1", "a2", "b1", "b2")}
        return cls(**parts, scale=facts.scale, kernel=kernel)

    def encode(self) -> dict[str, Tensor]:
        import torch

        ones = [1] * len(self.kernel)
        stored = {role: getattr(self, role) for role in ("a1", "a2", "b1")}
        shaped = {role: tensor.reshape(*tensor.shape, *ones) for role, tensor in stored.items()}
        shaped["b2"] = self.b2.reshape(*self.b2.shape[:-1], -1, *self.kernel)
        return {**shaped, ALPHA: torch.tensor(self.scale * self.b2.shape[-2], dtype=torch.float32)}

    @property
    def rows(self) -> int:
        return int(self.b1.shape[-2])

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a GLoRA adds depends on the weight", hint="merge it into its checkpoint"
        )

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 12 * min(rows * columns, SCRATCH)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W + strength · ΔW, linear in the strength as in LyCORIS; a block of rows at a time."""
        from adaptkit.linalg.precision import row_blocks

        a1, a2, b1, b2 = (tensor.to(base.dtype) for tensor in (self.a1, self.a2, self.b1, self.b2))
        window = math.prod(self.kernel)
        for rows in row_blocks(base):
            part = base[..., rows, :]
            wide = part.reshape(*part.shape[:-1], -1, window).transpose(-1, -2)  # (..., m, K, i)
            through = (wide @ a1.unsqueeze(-3)) @ a2.unsqueeze(-3)
            added = through.transpose(-1, -2).reshape(part.shape) + b1[..., rows, :] @ b2
            part.add_(added, alpha=strength * self.scale)
        return base

    def part(self, start: int, stop: int) -> Self:
        return replace(self, b1=self.b1[..., start:stop, :])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Exact for the parts of one weight: all rows have the same right factors."""
        import torch

        first = parts[0]
        for part in parts:
            if part.scale != first.scale or not all(
                same(getattr(part, n), getattr(first, n)) for n in ("a1", "a2", "b2")
            ):
                raise NotRepresentable(
                    "GLoRA that multiply the weight differently cannot be fused",
                    hint="merge them into their checkpoint",
                )
        return replace(first, b1=torch.cat([part.b1 for part in parts], -2))

    def folded(self) -> Self:
        """The scale is multiplied into `b1` and `a1`."""
        from adaptkit.linalg.precision import upcast

        if self.scale == 1.0:
            return self
        return replace(
            self, a1=upcast(self.a1) * self.scale, b1=upcast(self.b1) * self.scale, scale=1.0
        )


ALGORITHM = Glora
