"""BEFT: a difference of the bias of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.names import BIAS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@record
class Beft(OfPeft):
    """b' = b + added.   added: (..., m, 1), stored [1, m]

    huggingface/peft `tuners/beft/layer.py`, checked with 0.21.2. Of linear layers only.
    """

    name: ClassVar[str] = "beft"
    title: ClassVar[str] = "BEFT"
    peft_type: ClassVar[str] = "BEFT"
    roles: ClassVar[Mapping[str, Role]] = roles(added=Role("beft_bias", param=BIAS))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"added"}),)

    added: Tensor

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["added"]
        matched(len(shape) == 2 and shape[0] == 1 and shape[1] > 0, "added", shapes)
        return Facts(shape[1], 1, (), None, 1.0, vector=True)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["added"].mT)

    def encode(self) -> dict[str, Tensor]:
        return {"added": self.added.mT}

    @property
    def rows(self) -> int:
        return int(self.added.shape[-2])

    def delta(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.added)

    def times(self, factor: float) -> Self:
        return replace(self, added=self.delta() * factor)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, added=self.added[..., start:stop, :])

    def swapped(self) -> Self:
        return replace(self, added=self.added.roll(self.rows // 2, -2))


ALGORITHM = Beft
