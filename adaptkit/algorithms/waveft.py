"""WaveFT: some coefficients of the two-dimensional wavelet transform of a difference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._drawn import permuted
from adaptkit.algorithms._foreign import number, seed
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._sparse import Sparse
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms._wavelets import filters, synthesised
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class WaveFt(Sparse):
    """ΔW = scale · D⁻¹(S), D a wavelet transform of one level; scale · S without `use_idwt`.

    entries: (..., k), the entries of S (m, n) that are not zero

    Their places are the first k of a permutation of m·n that torch draws from a seed on the CPU. S
    stands in the middle of a matrix of zeros, longer by the filter's length less 2, and of even
    sides (Bilican et al., arXiv:2505.12532; huggingface/peft `tuners/waveft/layer.py`, checked
    with 0.21.2). Of linear layers only. Neither the seed, the scale, the wavelet nor the size of
    the weight is in the tensors.
    """

    name: ClassVar[str] = "waveft"
    title: ClassVar[str] = "WaveFT"
    peft_type: ClassVar[str] = "WAVEFT"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"random_loc_seed": 777, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True}
    )
    roles: ClassVar[Mapping[str, Role]] = roles(entries=Role("waveft_spectrum"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"entries"}),)

    entries: Tensor
    seed: int
    wavelet: str  # "": S is the difference itself
    factor: float

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        matched(len(shapes["entries"]) == 1 and shapes["entries"][0] > 0, "entries", shapes)
        return Facts(0, 0, (), None, 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        scale, family = number(said["scaling"], "scaling"), str(said["wavelet_family"])
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: scaling is {scale:g}")
        if said["use_idwt"] and filters(family) is None:
            raise NotRepresentable(
                f"adapter_config.json: wavelet_family is {family}; db1 to db10 and sym2 to sym10 "
                "are computed"
            )
        drawn = seed(said["random_loc_seed"], "random_loc_seed")
        return replace(facts, scale=scale, settings=(drawn, family if said["use_idwt"] else ""))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        drawn, wavelet = facts.settings
        return cls(tensors["entries"], drawn, wavelet, facts.scale)

    def encode(self) -> dict[str, Tensor]:
        return {"entries": self.entries}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The number of entries of every module, which PEFT may have spread by their sizes."""
        found = counted(modules, "n_frequency", "n_frequency_pattern", role="entries")
        return {**found, "proportional_parameters": False}

    @property
    def scale(self) -> float:
        return self.factor

    def places(self, base: Tensor) -> Tensor:
        numbers, count = base.shape[-2] * base.shape[-1], self.entries.shape[-1]
        self._fitting(count <= numbers, base)
        return permuted(numbers, count, self.seed)

    def spread(self, base: Tensor) -> Tensor:
        found = super().spread(base)
        known = filters(self.wavelet) if self.wavelet else None
        if known is None:
            return found
        trim, sizes = len(known[0]) - 2, base.shape[-2:]
        # even sides; what is over on the right and below is one more
        missing = [size + trim + (size + trim) % 2 - size for size in sizes]
        (above, below), (left, right) = ((n // 2, n - n // 2) for n in missing)
        import torch

        padded = torch.nn.functional.pad(found, (left, right, above, below))
        whole = synthesised(padded, self.wavelet)
        top, first = ((n - size) // 2 for n, size in zip(whole.shape[-2:], sizes, strict=True))
        return whole[..., top : top + sizes[0], first : first + sizes[1]]


ALGORITHM = WaveFt
