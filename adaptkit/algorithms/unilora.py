"""UniLoRA: a LoRA whose numbers are all taken from one vector for the model."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class UniLora(OfPeft):
    """ΔW = (bank[ups] ⊙ up_scales) · (bank[downs] ⊙ down_scales).

    bank: (..., d)   ups, up_scales: (..., m, r)   downs, down_scales: (..., r, n)

    ⊙ multiplies entry by entry (huggingface/peft `tuners/unilora/layer.py`, checked with 0.21.2).
    `bank` is stored once. A file without the places (`save_indices = False`) holds it alone, and is
    not read: the places follow the order of the layers in the model, which no file tells. Of linear
    layers only.
    """

    name: ClassVar[str] = "unilora"
    title: ClassVar[str] = "UniLoRA"
    peft_type: ClassVar[str] = "UNILORA"
    resized: ClassVar[str | None] = "lora"
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({"bank": "unilora_theta_d"})
    roles: ClassVar[Mapping[str, Role]] = roles(
        ups=Role("unilora_indices_B", integers=True),
        downs=Role("unilora_indices_A", integers=True),
        up_scales=Role("unilora_scales_B"),
        down_scales=Role("unilora_scales_A"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"ups", "downs", "up_scales", "down_scales"}),
    )

    bank: Tensor
    ups: Tensor
    downs: Tensor
    up_scales: Tensor
    down_scales: Tensor

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        ups, downs = shapes["ups"], shapes["downs"]
        fits = len(ups) == len(downs) == 2 and ups[1] == downs[0] > 0
        fits = fits and shapes["up_scales"] == ups and shapes["down_scales"] == downs
        matched(fits and len(shapes.get("bank", ())) == 1, " ".join(shapes), shapes)
        return Facts(ups[0], downs[1], (), ups[1], 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(**tensors)

    def encode(self) -> dict[str, Tensor]:
        scales = {"up_scales": self.up_scales, "down_scales": self.down_scales}
        return {"bank": self.bank, "ups": self.ups.long(), "downs": self.downs.long(), **scales}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        length = modules[0].shapes["bank"][0]
        return {**counted(modules, "r"), "theta_d_length": length, "save_indices": True}

    @property
    def rows(self) -> int:
        return int(self.ups.shape[-2])

    def factors(self) -> tuple[Tensor, Tensor]:
        from adaptkit.linalg.precision import upcast

        bank = upcast(self.bank)

        def taken(places: Tensor, scales: Tensor) -> Tensor:
            places = places.long()
            if not 0 <= int(places.min()) <= int(places.max()) < bank.shape[-1]:
                raise ShapeMismatch(f"a place beyond the {bank.shape[-1]} numbers of the bank")
            flat = places.flatten(-2)
            found = bank.expand(*flat.shape[:-1], -1).gather(-1, flat).reshape(places.shape)
            return found * upcast(scales)

        return taken(self.ups, self.up_scales), taken(self.downs, self.down_scales)

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, up_scales=upcast(self.up_scales) * factor)

    def part(self, start: int, stop: int) -> Self:
        rows = slice(start, stop)
        return replace(self, ups=self.ups[..., rows, :], up_scales=self.up_scales[..., rows, :])

    def swapped(self) -> Self:
        half = self.rows // 2
        return replace(self, ups=self.ups.roll(half, -2), up_scales=self.up_scales.roll(half, -2))


ALGORITHM = UniLora
