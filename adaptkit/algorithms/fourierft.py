"""FourierFT: some coefficients of the two-dimensional Fourier transform of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, number
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms._settings import Wanted


@dataclass(frozen=True, eq=False)
class FourierFt(Applied):
    """ΔW = scale · Re F⁻¹(S).   coefficients: (..., k), the entries of S (m, n) that are not zero

    Their places are the first k of a permutation of m·n that torch draws from a seed on the CPU
    (Gao et al., arXiv:2405.03003; huggingface/peft `tuners/fourierft/layer.py`, checked with
    0.21.2). Of linear layers only. Neither the seed, the scale nor the size of the weight is in the
    tensors.
    """

    name: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "FourierFT"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"random_loc_seed": 777, "scaling": 150.0}
    )
    roles: ClassVar[Mapping[str, Role]] = roles(coefficients=Role("fourierft_spectrum"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"coefficients"}),)

    coefficients: Tensor
    seed: int
    scale: float

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        matched(
            len(shapes["coefficients"]) == 1 and shapes["coefficients"][0] > 0,
            "coefficients",
            shapes,
        )
        return Facts(0, 0, (), None, 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        seed, scale = said["random_loc_seed"], number(said["scaling"], "scaling")
        if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 1 << 63:
            raise NotRepresentable(f"adapter_config.json: random_loc_seed is {seed!r}, no seed")
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: scaling is {scale:g}")
        return replace(facts, scale=scale, settings=(seed,))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["coefficients"], facts.settings[0], facts.scale)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 20 * rows * columns  # S, and its complex transform

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        rows, columns = base.shape[-2:]
        count = self.coefficients.shape[-1]
        self._fitting(count <= rows * columns, base)
        spectrum = base.new_zeros(*base.shape[:-2], rows * columns)
        spectrum[..., _places(rows * columns, count, self.seed).to(base.device)] = (
            self.coefficients.to(base.dtype)
        )
        change = torch.fft.ifft2(spectrum.reshape(base.shape)).real
        return base.add_(change, alpha=strength * self.scale)


@lru_cache(maxsize=4)
def _places(numbers: int, count: int, seed: int) -> Tensor:
    import torch

    drawn = torch.randperm(numbers, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].clone()


ALGORITHM = FourierFt
