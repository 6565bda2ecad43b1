"""GraLoRA: a LoRA for each block of the weight, and perhaps one for the whole of it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft, number
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NonFinite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class GraLora(OfPeft):
    """ΔW = scale · (blocks + up · down), the weight being cut into k × k blocks.

    ins: (..., k, n/k, r)   outs: (..., k, r, m/k)   up: (..., m, h)   down: (..., h, n)

    Block (i, j) is outs[i][j-th part of r]ᵀ · ins[j][i-th part of r]ᵀ, of rank r/k. The scale is
    alpha / (r + h), h = 0 without `up` and `down` (Jung et al., arXiv:2505.20355; huggingface/peft
    `tuners/gralora/layer.py`, checked with 0.21.2). Of linear layers only.
    """

    name: ClassVar[str] = "gralora"
    title: ClassVar[str] = "GraLoRA"
    peft_type: ClassVar[str] = "GRALORA"
    resized: ClassVar[str | None] = "lora"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"alpha": 64})
    roles: ClassVar[Mapping[str, Role]] = roles(
        ins=Role("gralora_A"),
        outs=Role("gralora_B"),
        down=Role("gralora_A_general.weight"),
        up=Role("gralora_B_general.weight"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"ins", "outs"}),
        frozenset({"ins", "outs", "up", "down"}),
    )

    ins: Tensor
    outs: Tensor
    up: Tensor | None
    down: Tensor | None
    scale: float

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        ins, outs = shapes["ins"], shapes["outs"]
        matched(len(ins) == len(outs) == 3 and 0 not in (*ins, *outs), "ins outs", shapes)
        blocks, part, rank = ins
        matched(outs[:2] == (blocks, rank) and rank % blocks == 0, "ins outs", shapes)
        rows, columns, beside = blocks * outs[2], blocks * part, 0
        if "up" in shapes:
            up, down = shapes["up"], shapes["down"]
            fits = len(up) == 2 and len(down) == 2 and up[1] == down[0]
            matched(fits and (up[0], down[1]) == (rows, columns), "ins outs up down", shapes)
            beside = up[1]
        return Facts(rows, columns, (), rank, 1.0 / (rank + beside))

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        scale = facts.scale * number(cls.stated(wanted)["alpha"], "alpha")
        if not math.isfinite(scale):
            raise NonFinite(f"the scale of a GraLoRA is {scale:g}")
        return replace(facts, scale=scale)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        pair = tensors.get("up"), tensors.get("down")
        return cls(tensors["ins"], tensors["outs"], *pair, facts.scale)

    def encode(self) -> dict[str, Tensor]:
        found = {"ins": self.ins, "outs": self.outs}
        if self.up is not None and self.down is not None:
            found |= {"up": self.up, "down": self.down}
        return found

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        ranks = {"r": [m.facts.rank for m in modules]}
        ranks["gralora_k"] = [m.shapes["ins"][0] for m in modules]
        ranks["hybrid_r"] = [m.shapes["up"][1] if "up" in m.shapes else 0 for m in modules]
        return {name: one_for_all(name, values) for name, values in ranks.items()}

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        beside = shapes["up"][1] if "up" in shapes else 0
        return shapes["ins"][0] * shapes["ins"][2] + beside

    @property
    def rows(self) -> int:
        return int(self.outs.shape[-3] * self.outs.shape[-1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of rank k · r + h: the parts of r of all blocks, side by side."""
        import torch

        from adaptkit.linalg.precision import upcast

        ins, outs = upcast(self.ins), upcast(self.outs) * self.scale
        *batch, k, part, rank = ins.shape
        own, tall = rank // k, outs.shape[-1]
        left = outs.new_zeros(*batch, k, tall, k, k, own)  # i, o, (i, j, q)
        right = ins.new_zeros(*batch, k, k, own, k, part)  # (i, j, q), j, n
        theirs = ins.reshape(*batch, k, part, k, own)  # j, n, i, q
        for i in range(k):
            # (j, q, o) → (o, j, q)
            mine = outs[..., i, :, :].reshape(*batch, k, own, tall)
            left[..., i, :, i, :, :] = mine.movedim(-1, -3)
            for j in range(k):
                right[..., i, j, :, j, :] = theirs[..., j, :, i, :].mT
        left = left.reshape(*batch, k * tall, k * k * own)
        right = right.reshape(*batch, k * k * own, k * part)
        if self.up is None or self.down is None:
            return left, right
        left = torch.cat([left, upcast(self.up) * self.scale], -1)
        return left, torch.cat([right, upcast(self.down)], -2)

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def times(self, factor: float) -> Self:
        """One factor of each product is multiplied: the scale is that of the whole file."""
        from adaptkit.linalg.precision import upcast

        up = None if self.up is None else upcast(self.up) * factor
        return replace(self, outs=upcast(self.outs) * factor, up=up)


ALGORITHM = GraLora
