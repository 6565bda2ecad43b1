"""FourierFT: some coefficients of the two-dimensional Fourier transform of a difference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._drawn import permuted
from adaptkit.algorithms._foreign import Applied, OfPeft, number, seed
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import by_end
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class FourierFt(OfPeft, Applied):
    """ΔW = scale · Re F⁻¹(S).   coefficients: (..., k), the entries of S (m, n) that are not zero

    Their places are the first k of a permutation of m·n that torch draws from a seed on the CPU
    (Gao et al., arXiv:2405.03003; huggingface/peft `tuners/fourierft/layer.py`, checked with
    0.21.2). Of linear layers only. Neither the seed, the scale nor the size of the weight is in the
    tensors.
    """

    name: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "FourierFT"
    peft_type: ClassVar[str] = "FOURIERFT"
    linear: ClassVar[bool] = True
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
        scale = number(said["scaling"], "scaling")
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: scaling is {scale:g}")
        drawn = seed(said["random_loc_seed"], "random_loc_seed")
        return replace(facts, scale=scale, settings=(drawn,))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["coefficients"], facts.settings[0], facts.scale)

    def encode(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        counts = {m.name: m.shapes["coefficients"][0] for m in modules}
        return by_end("n_frequency", counts)

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, coefficients=upcast(self.coefficients) * factor)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 12 * rows * columns  # half of S, complex, transformed one way, and ΔW

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        rows, columns = base.shape[-2:]
        count, half = self.coefficients.shape[-1], columns // 2 + 1
        self._fitting(count <= rows * columns, base)
        places = permuted(rows * columns, count, self.seed).to(base.device)
        i, j = places // columns, places % columns
        numbers = self.coefficients.to(base.dtype) / 2
        # the real part is the transform of S + its mirror image, of which one half tells the other
        wide = torch.promote_types(base.dtype, torch.complex64)
        spectrum = base.new_zeros(*base.shape[:-2], rows, half, dtype=wide)
        for row, column in ((i, j), (-i % rows, -j % columns)):
            kept = column < half
            spectrum[..., row[kept], column[kept]] += numbers[..., kept]
        change = torch.fft.irfft2(spectrum, s=(rows, columns))
        return base.add_(change, alpha=strength * self.scale)


ALGORITHM = FourierFt
