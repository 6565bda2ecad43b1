"""AdaLoRA: a LoRA in the form of a singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Unwritten, number
from adaptkit.algorithms._stored import flat, matched, roles, scaling
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated
from adaptkit.errors import NonFinite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms._settings import Wanted

TINY = 1e-5  # PEFT adds it to the rank


@dataclass(frozen=True, eq=False)
class AdaLora(Unwritten):
    """ΔW = scale · up · diag(values) · down.

    up: (..., m, r)   values: (..., r)   down: (..., r, n)

    scale is lora_alpha / (init_r + 1e-5), init_r the rank before the training took ranks away
    (Zhang et al., arXiv:2303.10512; huggingface/peft `tuners/adalora/layer.py`, checked with
    0.21.2). An alpha that is not positive stands for init_r.
    """

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    resized: ClassVar[str | None] = "lora"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"init_r": 12})
    by_rows: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        up=Role("lora_B"),
        down=Role("lora_A"),
        values=Role("lora_E"),
        alpha=Role(ALPHA),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"up", "down", "values"}),)

    up: Tensor
    down: Tensor
    values: Tensor
    scale: float

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        up, down, values = shapes["up"], shapes["down"], shapes["values"]
        rank = down[0]
        fits = len(up) == len(down) == 2 and rank > 0 and up[1] == rank == math.prod(values)
        matched(fits, "up values down", shapes)
        plain = None if alpha is None else Stated(alpha.value)
        return Facts(up[0], down[1], None, rank, scaling(plain, rank))

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        first = number(cls.stated(wanted)["init_r"], "init_r")
        alpha = facts.scale * (facts.rank or 1)
        scale = (alpha if alpha > 0 else first) / (first + TINY)
        if not math.isfinite(scale) or first < 0:
            raise NonFinite(f"lora_alpha is {alpha:g} and init_r {first:g}")
        return replace(facts, scale=scale)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        up, down, values = tensors["up"], flat(tensors["down"], 2), tensors["values"]
        return cls(up, down, values.reshape(*down.shape[:-1]), facts.scale)

    @property
    def rows(self) -> int:
        return int(self.up.shape[-2])

    def factors(self) -> tuple[Tensor, Tensor]:
        from adaptkit.linalg.precision import upcast

        values = upcast(self.values) * self.scale
        return upcast(self.up) * values.unsqueeze(-2), upcast(self.down)

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def times(self, factor: float) -> Self:
        return replace(self, scale=self.scale * factor)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, up=self.up[..., start:stop, :])

    def swapped(self) -> Self:
        return replace(self, up=self.up.roll(self.rows // 2, -2))


ALGORITHM = AdaLora
