"""SuperTuning: a difference of which some entries are stored, and perhaps a LoRA beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import number
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._settings import CONFIG_HINT, Unsettled
from adaptkit.algorithms._sparse import Sparse
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class Supertuning(Sparse):
    """ΔW = S + lora_alpha / r · up · down, S having `entries` at the flat places `where`, else 0.

    entries, where: (..., k)   up: (..., m, r)   down: (..., r, n)

    Without `up` and `down` S alone (huggingface/peft `tuners/supertuning/layer.py`, checked with
    0.21.2). A file without the places (`save_precomputed_indices = False`) is not read: they are
    the largest numbers of the base, many of which are equal. Of linear layers only.
    """

    name: ClassVar[str] = "supertuning"
    title: ClassVar[str] = "SuperTuning"
    peft_type: ClassVar[str] = "SUPERTUNING"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"lora_alpha": None})
    roles: ClassVar[Mapping[str, Role]] = roles(
        entries=Role("supertuning_values"),
        where=Role("supertuning_indices", integers=True),
        up=Role("supertuning_lora_B.weight"),
        down=Role("supertuning_lora_A.weight"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"entries", "where"}),
        frozenset({"entries", "where", "up", "down"}),
    )

    entries: Tensor
    where: Tensor
    up: Tensor | None
    down: Tensor | None
    factor: float

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        entries = shapes["entries"]
        matched(len(entries) == 1 and shapes["where"] == entries, "entries where", shapes)
        if "up" not in shapes:
            return Facts(0, 0, (), None, 1.0)
        up, down = shapes["up"], shapes["down"]
        matched(len(up) == len(down) == 2 and up[1] == down[0] > 0, "up down", shapes)
        return Facts(up[0], down[1], (), up[1], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        if facts.rank is None:
            return facts
        scale = number(cls.stated(wanted)["lora_alpha"], "lora_alpha") / facts.rank
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: lora_alpha makes a scale of {scale}")
        return replace(facts, scale=scale)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        pair = tensors.get("up"), tensors.get("down")
        return cls(tensors["entries"], tensors["where"], *pair, facts.scale)

    def encode(self) -> dict[str, Tensor]:
        found = {"entries": self.entries, "where": self.where.int()}
        if self.up is not None and self.down is not None:
            found |= {"up": self.up, "down": self.down}
        return found

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The share of the entries, `sparsity`, stands in the configuration alone."""
        if any("sparsity" not in m.config for m in modules):
            raise Unsettled("the tensors of a SuperTuning do not tell its share", hint=CONFIG_HINT)
        rank = one_for_all("rank", (m.facts.rank for m in modules))
        return {"r": rank, "save_precomputed_indices": True}

    def places(self, base: Tensor) -> Tensor:
        return self.where.long()

    def apply(self, base: Tensor, strength: float) -> Tensor:
        base = super().apply(base, strength)
        if self.up is None or self.down is None:
            return base
        product = self.up.to(base.dtype) @ self.down.to(base.dtype)
        return base.add_(product, alpha=strength * self.factor)

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        up = None if self.up is None else upcast(self.up) * factor
        return replace(super().times(factor), up=up)


ALGORITHM = Supertuning
