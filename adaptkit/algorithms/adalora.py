"""AdaLoRA: a LoRA in the form of a singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft, count, number
from adaptkit.algorithms._lora_cut import SingularValues, by_singular_values
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import flat, matched, roles, scaling
from adaptkit.algorithms.contract import ALPHA, Facts, FitSpec, Role, Shapes, Stated, Weights
from adaptkit.errors import NonFinite, NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted
    from adaptkit.algorithms.contract import Decomposition

TINY = 1e-5  # PEFT adds it to the rank


@record
class AdaLora(OfPeft):
    """ΔW = scale · up · diag(values) · down.

    up: (..., m, r)   values: (..., r)   down: (..., r, n)

    scale is lora_alpha / (init_r + 1e-5), init_r the rank before the training took ranks away
    (Zhang et al., arXiv:2303.10512; huggingface/peft `tuners/adalora/layer.py`, checked with
    0.21.2). An alpha that is not positive stands for init_r.
    """

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    peft_type: ClassVar[str] = "ADALORA"
    resized: ClassVar[str | None] = "adalora"
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

    def encode(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down, "values": self.values.unsqueeze(-1)}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """`rank_pattern` marks the ranks that were kept of `init_r`."""
        config = modules[0].config
        first = count(config.get("init_r", cls.settings["init_r"]), "init_r")
        ranks = {m.name: m.facts.rank or 0 for m in modules}
        most = max(ranks.values())
        if most > first:
            raise NotRepresentable(
                f"a module has rank {most}, and AdaLoRA none above init_r = {first}",
                hint="--algo lora can hold it",
            )
        # PEFT refuses to load an AdaLoRA that does not say how long it was trained
        found: dict[str, Any] = {"total_step": config.get("total_step") or 1, "rank_pattern": None}
        if any(rank < first for rank in ranks.values()):
            marks = {f"{n}.lora_E": [k < rank for k in range(first)] for n, rank in ranks.items()}
            found["rank_pattern"] = marks
        return found

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

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """By singular values, which take the place of the stored ones; the scale stays."""
        if not isinstance(weights, AdaLora):
            raise NotRepresentable(
                f"a {weights.name} has no scale of an AdaLoRA", hint="--algo lora has ranks"
            )
        found = by_singular_values(weights, spec, weights._svd)
        ladder = {field.name: getattr(found, field.name) for field in fields(SingularValues)}
        return _Values(**ladder)

    def _svd(self, up: Tensor, down: Tensor, kernel: tuple[int, ...]) -> AdaLora:
        """Balanced factors as normed vectors and their singular values."""
        import torch

        sizes = (torch.linalg.vector_norm(up, dim=-2), torch.linalg.vector_norm(down, dim=-1))
        left, right = (size.clamp_min(torch.finfo(size.dtype).tiny) for size in sizes)
        values = sizes[0] * sizes[1] / self.scale
        return AdaLora(up / left.unsqueeze(-2), down / right.unsqueeze(-1), values, self.scale)

    def times(self, factor: float) -> Self:
        """The values are multiplied: the scale is that of the whole file."""
        from adaptkit.linalg.precision import upcast

        return replace(self, values=upcast(self.values) * factor)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, up=self.up[..., start:stop, :])

    def swapped(self) -> Self:
        return replace(self, up=self.up.roll(self.rows // 2, -2))


class _Values(SingularValues):
    """The ladder of an AdaLoRA, which stores the singular values and flattens every kernel."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"up": (self.rows, rank), "down": (rank, self.columns), "values": (rank, 1)}

    def numbers(self, rank: int) -> int:
        return rank * (self.rows + self.columns + 1)


ALGORITHM = AdaLora
