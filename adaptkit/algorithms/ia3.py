"""IA³: every output row or input column multiplied by a learnt factor."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._parts import same
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable, ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class Ia3(Weights):
    """W' = W · (1 + weight) by rows, or by columns with `on_input` (arXiv:2205.05638).

    weight: (..., n), n the rows or the inputs. LyCORIS stores the number that is added to 1
    (`modules/ia3.py`: `weight` `[n]` or `[1, n, 1, 1]`, and the flag `on_input`). PEFT stores the
    factor itself (`ia3_l`: `[1, in]` for the input, `[out, 1]` for the output), and it is kept as
    such. Of a convolution it is `[1, n, 1, 1]` for either: the field `feedforward_modules` of the
    configuration tells. PEFT also multiplies the bias by an output factor.
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA³"
    additive: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    peft_type: ClassVar[str] = "IA3"
    peft_kept: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        weight=Role("weight"), on_input=Role("on_input"), factor=Role("ia3_l")
    )
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"feedforward_modules": ()})
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"weight", "on_input"}),
        frozenset({"factor"}),
    )

    weight: Tensor
    on_input: Tensor | None
    stored: tuple[int, ...] = ()  # the weight's own shape in the file
    columns: bool = False  # PEFT's factor, on the input

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        role = "weight" if "weight" in shapes else "factor"
        shape = shapes[role]
        if role == "weight":
            matched(math.prod(shape) == max(shape, default=0), role, shapes)
            matched(not shapes["on_input"], "on_input", shapes)
            return Facts(0, 0, None, None, 1.0)
        if len(shape) > 2:  # `settled` tells which side (`tuners/ia3/layer.py: _ConvNd`)
            matched(shape[0] == 1 == math.prod(shape[2:]), role, shapes)
            return Facts(0, 0, None, None, 1.0)
        matched(len(shape) == 2 and 1 in shape, role, shapes)
        side = (0, shape[1]) if shape[0] == 1 else (shape[0], 0)
        return Facts(*side, None, None, 1.0, settings=(shape[0] == 1, 2))

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        shape = wanted.shapes.get("factor", ())
        if len(shape) < 3:
            return facts
        cls.stated(wanted)
        inputs = wanted.listed("feedforward_modules")
        rows = 0 if inputs else shape[1]
        return replace(facts, rows=rows, settings=(inputs, len(shape)))

    @classmethod
    def changes_bias(cls, facts: Facts) -> bool:
        """PEFT multiplies it by an output factor; LyCORIS does not."""
        return facts.settings[:1] == (False,)

    def on_bias(self, weight: Tensor) -> Weights:
        return self

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        if "factor" in tensors:
            factor = tensors["factor"]
            on_input, own = facts.settings
            return cls(factor.flatten(-own), None, tuple(factor.shape[-own:]), on_input)
        stored, flag = tensors["weight"], tensors["on_input"]
        return cls(stored.reshape(*flag.shape, -1), flag, tuple(stored.shape[flag.ndim :]))

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """`feedforward_modules` are those whose inputs are multiplied."""
        if any("factor" not in module.shapes for module in modules):
            raise NotRepresentable(
                "PEFT does not read the IA³ of LyCORIS", hint="--algo full with --base CHECKPOINT"
            )
        inputs = [module.name for module in modules if module.facts.settings[0]]
        names = "|".join(name.replace(".", r"\.") for name in inputs)
        return {"feedforward_modules": names or []}

    def encode(self) -> dict[str, Tensor]:
        weight = self.weight.reshape(*self.weight.shape[:-1], *self.stored)
        return (
            {"factor": weight}
            if self.on_input is None
            else {"weight": weight, "on_input": self.on_input}
        )

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a factor changes depends on the weight", hint="merge it into its checkpoint"
        )

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 0

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W · (1 + strength · weight)."""
        import torch

        if self._mixed:
            return torch.stack([self.member(n).apply(one, strength) for n, one in enumerate(base)])
        wide = self.weight.to(base.dtype)
        side = -1 if self._wide else -2
        if base.shape[side] % wide.shape[-1] or (side == -2 and base.shape[-2] != wide.shape[-1]):
            raise ShapeMismatch(f"{wide.shape[-1]} factors do not fit {list(base.shape[-2:])}")
        added = (wide if self.on_input is not None else wide - 1.0) * strength
        if not self._wide:
            return base.mul_(1.0 + added.unsqueeze(-1))
        spread = (1.0 + added).repeat_interleave(base.shape[-1] // added.shape[-1], -1)
        return base.mul_(spread.unsqueeze(-2))

    @property
    def _wide(self) -> bool:
        """Whether it multiplies columns."""
        return self.columns if self.on_input is None else bool(self.on_input.reshape(-1)[0])

    @property
    def _mixed(self) -> bool:
        """Whether a batch has rows and columns: flags are values, so shapes do not tell them."""
        flags = None if self.on_input is None else self.on_input.reshape(-1).bool()
        return flags is not None and bool(flags.any()) and not bool(flags.all())

    @property
    def rows(self) -> int:
        if self._wide:
            raise NotRepresentable("a factor of the input does not tell the rows")
        return int(self.weight.shape[-1])

    def part(self, start: int, stop: int) -> Self:
        return self if self._wide else self._of(self.weight[..., start:stop])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        import torch

        first = parts[0]
        if not any(part._wide for part in parts):
            return first._of(torch.cat([part.weight for part in parts], -1))
        if all(part._wide and same(part.weight, first.weight) for part in parts):
            return first
        raise NotRepresentable(
            "rows whose inputs are multiplied differently cannot be fused",
            hint="merge them into their checkpoint",
        )

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        """Rows that keep their values: their weight is 0."""
        if like._wide:
            return super().zeros(like, rows)
        neutral = like.weight.new_zeros if like.on_input is not None else like.weight.new_ones
        return like._of(neutral(*like.weight.shape[:-1], rows))

    def swapped(self) -> Self:
        return self if self._wide else replace(self, weight=self.weight.roll(self.rows // 2, -1))

    def folded(self) -> Self:
        return self

    def _of(self, weight: Tensor) -> Self:
        """The same kind with other factors; only the longest stored dimension changes."""
        longest = max(range(len(self.stored)), key=self.stored.__getitem__)
        stored = (*self.stored[:longest], weight.shape[-1], *self.stored[longest + 1 :])
        return replace(self, weight=weight, stored=stored)


ALGORITHM = Ia3
