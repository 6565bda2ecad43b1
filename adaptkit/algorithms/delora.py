"""DeLoRA: a low-rank product of normed factors, times a strength and the norms of the weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated

SMALLEST = 1e-4  # no norm is taken as less


@record
class DeLora(OfPeft):
    """ΔW = up · diag(weights) · down · diag(norms).

    up: (..., m, r)   weights: (..., r)   down: (..., r, n)   norms: (..., n)

    weights = λ / r / (‖row of down‖ ‖column of up‖), with λ stored as `delora_lambda` and the norms
    of the base weight's columns at the start of the training as `delora_w_norm` (Bini et al.,
    arXiv:2503.18225; huggingface/peft `tuners/delora/layer.py`, checked with 0.21.2). Of linear
    layers only. Everything that counts is in the file.
    """

    name: ClassVar[str] = "delora"
    title: ClassVar[str] = "DeLoRA"
    peft_type: ClassVar[str] = "DELORA"
    resized: ClassVar[str | None] = "lora"
    by_rows: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        up=Role("delora_B"),
        down=Role("delora_A"),
        bound=Role("delora_lambda"),
        norms=Role("delora_w_norm"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"up", "down", "bound", "norms"}),)

    up: Tensor
    down: Tensor
    weights: Tensor
    norms: Tensor
    bound: Tensor | None  # λ as it is stored; None for some rows, whose `up` has other norms

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        up, down, norms = shapes["up"], shapes["down"], shapes["norms"]
        fits = len(up) == len(down) == 2 and up[1] == down[0] > 0 and norms == down[1:]
        matched(fits and math.prod(shapes["bound"]) == 1, "up down bound norms", shapes)
        return Facts(up[0], down[1], (), down[0], 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        from adaptkit.linalg.precision import upcast

        up, down = tensors["up"], tensors["down"]
        sizes = _norms(upcast(down), -1) * _norms(upcast(up), -2)
        bound = upcast(tensors["bound"]).reshape(*down.shape[:-2], 1)
        return cls(up, down, bound / down.shape[-2] / sizes, tensors["norms"], tensors["bound"])

    def encode(self) -> dict[str, Tensor]:
        if self.bound is None:
            raise NotRepresentable(
                "some rows of a DeLoRA are no DeLoRA", hint="--algo lora can hold them"
            )
        return {"up": self.up, "down": self.down, "bound": self.bound, "norms": self.norms}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return counted(modules, "r", "rank_pattern")

    @property
    def rows(self) -> int:
        return int(self.up.shape[-2])

    def factors(self) -> tuple[Tensor, Tensor]:
        from adaptkit.linalg.precision import upcast

        left = upcast(self.up) * self.weights.unsqueeze(-2)
        return left, upcast(self.down) * upcast(self.norms).unsqueeze(-2)

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        bound = None if self.bound is None else upcast(self.bound) * factor
        return replace(self, weights=self.weights * factor, bound=bound)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, up=self.up[..., start:stop, :], bound=None)

    def swapped(self) -> Self:
        return replace(self, up=self.up.roll(self.rows // 2, -2))


def _norms(matrix: Tensor, axis: int) -> Tensor:
    import torch

    found: Tensor = torch.linalg.vector_norm(matrix, dim=axis)
    return found.clamp(min=SMALLEST)


ALGORITHM = DeLora
