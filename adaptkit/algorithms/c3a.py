"""C3A: a difference of circulant blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import by_end
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class C3a(OfPeft):
    """ΔW[i·b + u, j·b + v] = kernels[i, j, (v − u) mod b] / n.   kernels: (..., m/b, n/b, b)

    Chen et al., arXiv:2407.19342; huggingface/peft `tuners/c3a`, checked with 0.21.2. Of linear
    layers only.
    """

    name: ClassVar[str] = "c3a"
    title: ClassVar[str] = "C3A"
    peft_type: ClassVar[str] = "C3A"
    resized: ClassVar[str | None] = "lora"
    roles: ClassVar[Mapping[str, Role]] = roles(kernels=Role("c3a_kernel"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"kernels"}),)

    kernels: Tensor

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["kernels"]
        matched(len(shape) == 3 and 0 not in shape, "kernels", shapes)
        return Facts(shape[0] * shape[2], shape[1] * shape[2], (), None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["kernels"])

    def encode(self) -> dict[str, Tensor]:
        return {"kernels": self.kernels}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return by_end("block_size", {m.name: m.shapes["kernels"][2] for m in modules})

    @property
    def rows(self) -> int:
        return int(self.kernels.shape[-3] * self.kernels.shape[-1])

    def delta(self) -> Tensor:
        import torch

        from adaptkit.linalg.precision import upcast

        wide = upcast(self.kernels)
        *batch, tall, across, size = wide.shape
        steps = torch.arange(size, device=wide.device)
        turned = wide[..., (steps - steps.unsqueeze(-1)) % size]  # (..., i, j, u, v)
        whole = turned.transpose(-2, -3).reshape(*batch, tall * size, across * size)
        return whole / (across * size)

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, kernels=upcast(self.kernels) * factor)


ALGORITHM = C3a
