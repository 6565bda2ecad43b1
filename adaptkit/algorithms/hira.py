"""HiRA: the weight is multiplied, entry by entry, by a low-rank product."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._stored import flat, matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class Hira(OfPeft, Applied):
    """W' = W + W ⊙ (up · down).   up: (..., m, r)   down: (..., r, i·K)

    There is no scale (Huang et al., ICLR 2025, `openreview TwJrTz9cRS`; huggingface/peft
    `tuners/hira/layer.py`, checked with 0.21.2). ⊙ multiplies entry by entry.
    """

    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    row_wise: ClassVar[bool] = True
    peft_type: ClassVar[str] = "HIRA"
    linear: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(up=Role("hira_B"), down=Role("hira_A"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"up", "down"}),)

    up: Tensor
    down: Tensor
    kernel: tuple[int, ...] = ()

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        up, down = shapes["up"], shapes["down"]
        fits = len(up) == len(down) >= 2 and up[1] == down[0] > 0 and math.prod(up[2:]) == 1
        matched(fits, "up down", shapes)
        return Facts(up[0], math.prod(down[1:]), down[2:], down[0], 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        kernel = facts.kernel or ()
        own = 2 + len(kernel)
        return cls(flat(tensors["up"], own), flat(tensors["down"], own), kernel)

    def encode(self) -> dict[str, Tensor]:
        up = self.up.reshape(*self.up.shape, *(1 for _ in self.kernel))
        return {"up": up, "down": self.down.reshape(*self.down.shape[:-1], -1, *self.kernel)}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return counted(modules, "r", "rank_pattern")

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, up=upcast(self.up) * factor)

    @property
    def rows(self) -> int:
        return int(self.up.shape[-2])

    def apply(self, base: Tensor, strength: float) -> Tensor:
        product = self.up.to(base.dtype) @ self.down.to(base.dtype)
        return base.mul_(product.mul_(strength).add_(1.0))

    def part(self, start: int, stop: int) -> Self:
        return replace(self, up=self.up[..., start:stop, :])

    def swapped(self) -> Self:
        return replace(self, up=self.up.roll(self.rows // 2, -2))


ALGORITHM = Hira
