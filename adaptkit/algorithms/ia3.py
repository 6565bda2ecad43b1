"""IA³: every output row, or every input column, multiplied by a learnt factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._weights import Facts, Role, Shapes, Stated, Weights, matched, roles
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ia3(Weights):
    """W' = W · (1 + weight), by rows, or by columns where `on_input` is set (Liu et al., arXiv:2205.05638).

    weight: (..., n), n the rows or the inputs. LyCORIS stores what is added to 1 (`modules/ia3.py`: `weight` `[n]` or
    `[1, n, 1, 1]`, and the flag `on_input`); PEFT the factor itself (`ia3_l`: `[1, in]` for the input, `[out, 1]` for
    the output), which is taken as it is.
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA³"
    additive: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, Role]] = roles(weight=Role("weight"), on_input=Role("on_input"), factor=Role("ia3_l"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"weight", "on_input"}), frozenset({"factor"}))

    weight: Tensor
    on_input: Tensor | None
    stored: tuple[int, ...] = ()
    columns: bool = False  # PEFT's factor, on the input

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        role = "weight" if "weight" in shapes else "factor"
        shape = shapes[role]
        if role == "weight":
            matched(math.prod(shape) == max(shape, default=0), role, shapes)
            return Facts(0, 0, None, None, 1.0)
        matched(len(shape) >= 2 and 1 in shape[:2], role, shapes)
        side = (0, shape[1]) if shape[0] == 1 else (shape[0], 0)
        return Facts(*side, None, None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        if "factor" in tensors:
            stored = tensors["factor"]
            wide = facts.columns > 0
            return cls(
                stored.reshape(*_batch(stored, facts.columns or facts.rows), -1), None, tuple(stored.shape), wide
            )
        stored, flag = tensors["weight"], tensors["on_input"]
        return cls(stored.reshape(*flag.shape, -1), flag, tuple(stored.shape[flag.ndim :]))

    def encode(self) -> dict[str, Tensor]:
        if self.on_input is None:
            return {"factor": self.weight.reshape(self.stored)}
        return {"weight": self.weight.reshape(*self.on_input.shape, *self.stored), "on_input": self.on_input}

    def delta(self) -> Tensor:
        raise NotRepresentable("what a factor changes depends on the weight", hint="merge it into its checkpoint")

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W · (1 + strength · weight)."""
        wide = self.weight.to(base.dtype)
        added = (wide if self.on_input is not None else wide - 1.0) * strength
        columns = self.columns if self.on_input is None else bool(self.on_input.reshape(-1)[0])
        if not columns:
            return base.mul_(1.0 + added.unsqueeze(-1))
        spread = (1.0 + added).repeat_interleave(base.shape[-1] // added.shape[-1], -1)
        return base.mul_(spread.unsqueeze(-2))

    def part(self, start: int, stop: int) -> Self:
        columns = self.columns if self.on_input is None else bool(self.on_input.reshape(-1)[0])
        if columns:
            return self
        return replace(self, weight=self.weight[..., start:stop], stored=_resized(self.stored, stop - start))

    def folded(self) -> Self:
        return self


def _batch(stored: Tensor, count: int) -> tuple[int, ...]:
    return tuple(stored.shape[:-2]) if stored.numel() != count else ()


def _resized(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The stored shape with another length in its one long dimension."""
    longest = max(range(len(shape)), key=shape.__getitem__)
    return (*shape[:longest], count, *shape[longest + 1 :])


ALGORITHM = Ia3
