"""set: a weight that replaces that of the base."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Set(Weights):
    """W' = value (..., m, n); a vector is a column, (..., m, 1).

    ComfyUI calls it `set_weight` (`comfy/lora.py`). The control LoRAs of FLUX.1 store the scales of
    their norms so, as `scale`; diffusers overwrites those norms too.
    """

    name: ClassVar[str] = "set"
    title: ClassVar[str] = "replaced weight"
    additive: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, Role]] = roles(value=Role("set_weight", ("scale",)))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"value"}),)

    value: Tensor
    kernel: tuple[int, ...] = ()
    vector: bool = False

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        ((role, shape),) = shapes.items()
        matched(len(shape) >= 1, role, shapes)
        return Facts(shape[0], math.prod(shape[1:]), shape[2:], None, 1.0, vector=len(shape) == 1)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        (stored,) = tensors.values()
        own = 1 if facts.vector else 2 + len(facts.kernel or ())
        matrix = stored.reshape(*stored.shape[: stored.ndim - own], facts.rows, facts.columns)
        return cls(matrix, facts.kernel or (), facts.vector)

    def encode(self) -> dict[str, Tensor]:
        rows = self.value.shape[:-1]
        return {"value": self.value.reshape(rows if self.vector else (*rows, -1, *self.kernel))}

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


ALGORITHM = Set
