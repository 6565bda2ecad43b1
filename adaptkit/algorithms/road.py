"""RoAd: pairs of output rows, turned and scaled."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms._settings import Wanted

# numbers stored for two rows
VARIANTS = MappingProxyType({"road_1": 1, "road_2": 2, "road_4": 4})


@record
class Road(OfPeft, Applied):
    """W'_a = s cos θ · W_a − s' sin θ' · W_b and W'_b likewise with +; b' = the same of b.

    angles θ, sizes s: (..., k)

    Rows a and b lie half a group apart. The two rows of a pair share their numbers in `road_1`,
    each row has its own in `road_2`, and each row has two in `road_4`, the second for sin (Liao and
    Monz, arXiv:2409.00119; huggingface/peft `tuners/road/layer.py`, checked with 0.21.2). Of
    linear layers only.
    """

    name: ClassVar[str] = "road"
    title: ClassVar[str] = "RoAd"
    peft_type: ClassVar[str] = "ROAD"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"variant": "road_1", "group_size": 64}
    )
    roles: ClassVar[Mapping[str, Role]] = roles(angles=Role("road_theta"), sizes=Role("road_alpha"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"angles", "sizes"}),)

    angles: Tensor
    sizes: Tensor
    variant: int
    group: int

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        angles, sizes = shapes["angles"], shapes["sizes"]
        matched(len(angles) == 1 and angles == sizes and angles[0] > 0, "angles sizes", shapes)
        return Facts(0, 0, (), None, 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        variant, group = VARIANTS.get(str(said["variant"])), said["group_size"]
        if variant is None:
            raise NotRepresentable(f"adapter_config.json: variant is {said['variant']!r}")
        if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
            raise NotRepresentable(f"adapter_config.json: group_size is {group!r}")
        stored = wanted.shapes["angles"][0]
        rows = stored * 2 // variant
        matched(stored * 2 % variant == 0 and rows % group == 0, "angles", wanted.shapes)
        return replace(facts, rows=rows, settings=(variant, group))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["angles"], tensors["sizes"], *facts.settings)

    def encode(self) -> dict[str, Tensor]:
        return {"angles": self.angles, "sizes": self.sizes}

    @property
    def rows(self) -> int:
        return int(self.angles.shape[-1]) * 2 // self.variant

    def _turns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies every row, and what multiplies the other row of its pair."""
        angles, sizes = self.angles.to(like.dtype), self.sizes.to(like.dtype)
        cos, sin = sizes * angles.cos(), sizes * angles.sin()
        batch = angles.shape[:-1]
        if self.variant == 1:  # one for both halves of a group
            shape = (*batch, -1, 1, self.group // 2)
            wide = (*batch, self.rows // self.group, 2, self.group // 2)
            cos, sin = (one.reshape(shape).expand(wide) for one in (cos, sin))
        elif self.variant == 4:
            cos, sin = (
                one.reshape(*batch, -1, 2, self.group)[..., n, :]
                for n, one in enumerate((cos, sin))
            )
        return cos.reshape(*batch, -1, 1), sin.reshape(*batch, -1, 1)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        self._fitting(base.shape[-2] == self.rows, base)
        own, other = self._turns(base)
        halves = base.reshape(*base.shape[:-2], -1, 2, self.group // 2, base.shape[-1])
        one, two = halves.unbind(-3)
        across = torch.stack([-two, one], -3).reshape(base.shape)
        return toward(base, across.mul_(other).addcmul_(base, own), strength)

    @classmethod
    def changes_bias(cls, facts: Facts) -> bool:
        return True

    def on_bias(self, weight: Tensor) -> Weights:
        return self

    def part(self, start: int, stop: int) -> Self:
        """Whole groups are rows of their own."""
        if start % self.group or stop % self.group:
            return super().part(start, stop)
        n = slice(start * self.variant // 2, stop * self.variant // 2)
        return replace(self, angles=self.angles[..., n], sizes=self.sizes[..., n])

    def swapped(self) -> Self:
        if self.rows // 2 % self.group:
            return super().swapped()
        half = self.angles.shape[-1] // 2
        return replace(self, angles=self.angles.roll(half, -1), sizes=self.sizes.roll(half, -1))


ALGORITHM = Road
