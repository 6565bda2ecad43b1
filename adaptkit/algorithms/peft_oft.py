"""OFT as PEFT stores it: packed generators of rotations on the input side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._weights import Facts, Role, Shapes, Stated, Weights, matched, roles
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeftOft(Weights):
    """W' = W · blockdiag(R)ᵀ.   packed: (..., n, b(b−1)/2), columns = n·b; with n = 1 one block serves all columns

    Q is skew-symmetric with `packed` above its diagonal, and R = I + 2Q + 2Q² + 2Q³ + Q⁴, the Cayley–Neumann series of
    five terms that PEFT uses unless told otherwise (huggingface/peft `tuners/oft/layer.py`, checked with 0.21.2). The
    columns of a convolution are its inputs with their kernel positions, as `flatten(1)` has them: so PEFT merges it, while
    its own forward pass adds up overlapping windows, which no weight can do.
    """

    name: ClassVar[str] = "peft-oft"
    title: ClassVar[str] = "OFT of PEFT"
    additive: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, Role]] = roles(packed=Role("oft_R.weight", ("oft_R",)))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"packed"}),)

    packed: Tensor
    size: int

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["packed"]
        size = _size(shape[-1])
        matched(len(shape) == 2 and size > 0, "packed", shapes)
        return Facts(0, shape[0] * size if shape[0] > 1 else 0, None, None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        packed = tensors["packed"]
        return cls(packed, _size(packed.shape[-1]))

    def encode(self) -> dict[str, Tensor]:
        return {"packed": self.packed}

    def delta(self) -> Tensor:
        raise NotRepresentable("what a rotation changes depends on the weight", hint="merge it into its checkpoint")

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        b = self.size
        above = torch.triu_indices(b, b, 1, device=base.device)
        skew = base.new_zeros(*self.packed.shape[:-1], b, b)
        skew[..., above[0], above[1]] = self.packed.to(base.dtype)
        skew = skew - skew.mT
        square = skew @ skew
        eye = torch.eye(b, dtype=base.dtype, device=base.device)
        turn = eye + 2 * skew + 2 * square + 2 * square @ skew + square @ square
        cut = base.reshape(*base.shape[:-1], -1, b).transpose(-2, -3)  # (..., n, rows, b)
        merged = (cut @ turn.mT).transpose(-2, -3).reshape(base.shape)
        return toward(base, merged, strength)

    def folded(self) -> Self:
        return self

    def part(self, start: int, stop: int) -> Self:  # noqa: ARG002 the contract's names
        """The columns are turned alike in all rows."""
        return self


def _size(elements: int) -> int:
    """b with b(b−1)/2 = elements; 0 where there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


ALGORITHM = PeftOft
