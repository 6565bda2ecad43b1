"""VeRA: one random product for the whole model, scaled by two vectors in each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Applied
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms._settings import Wanted

STORED = frozenset({"rows", "inner", "left", "right"})


@dataclass(frozen=True, eq=False)
class Vera(Applied):
    """ΔW = diag(scales) · left[:m] · diag(inner) · right[:, :n].

    scales: (..., m)   inner: (..., r)   left: (..., M, r)   right: (..., r, N)

    left and right are `vera_B` and `vera_A`, one pair for the model, of the size of its largest
    layer (Kopiczko et al., arXiv:2310.11454; huggingface/peft `tuners/vera`, checked with 0.21.2).
    A file without them (`save_projection = False`) states the seed that they are drawn from, right
    before left, uniformly within ±√(6 / n), n the columns of each; they need M and N, the most rows
    and columns of all layers with an adapter. Of linear layers only.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"projection_prng_key": 0})
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({"left": "vera_B", "right": "vera_A"})
    row_wise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        rows=Role("vera_lambda_b"), inner=Role("vera_lambda_d")
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"rows", "inner"}),)

    scales: Tensor
    inner: Tensor
    left: Tensor | None  # None where the sizes of the model are not known
    right: Tensor | None

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        rows, inner = shapes["rows"], shapes["inner"]
        fits = len(rows) == len(inner) == 1 and 0 not in (*rows, *inner)
        if fits and shapes.keys() == STORED:
            left, right = shapes["left"], shapes["right"]
            fits = len(left) == len(right) == 2 and left[1] == right[0] == inner[0]
            fits = fits and left[0] >= rows[0]
        fits = fits and ("left" in shapes) == ("right" in shapes)
        matched(fits, "rows inner left right", shapes)
        return Facts(rows[0], 0, (), inner[0], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        if wanted.shapes.keys() == STORED:
            return facts
        seed = cls.stated(wanted)["projection_prng_key"]
        if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 1 << 63:
            raise NotRepresentable(f"adapter_config.json: projection_prng_key is {seed!r}, no seed")
        return replace(facts, settings=(seed,))

    @classmethod
    def beside(cls, facts: Facts, rows: int, columns: int) -> Facts:
        if not facts.settings:
            return facts
        return replace(facts, settings=(facts.settings[0], rows, columns))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        rows, inner = tensors["rows"], tensors["inner"]
        if "left" in tensors:
            return cls(rows, inner, tensors["left"][..., : rows.shape[-1], :], tensors["right"])
        if len(facts.settings) < 3:
            return cls(rows, inner, None, None)
        left, right = _drawn(int(facts.rank or 0), *facts.settings)
        left, right = left.to(rows.device), right.to(rows.device)
        return cls(rows, inner, left[: rows.shape[-1]], right)

    @property
    def rows(self) -> int:
        return int(self.scales.shape[-1])

    def apply(self, base: Tensor, strength: float) -> Tensor:
        if self.left is None or self.right is None:
            raise NotRepresentable("its projections are drawn for a model of unknown size")
        columns = base.shape[-1]
        self._fitting(columns <= self.right.shape[-1] and self.rows == base.shape[-2], base)
        left = self.scales.to(base.dtype).unsqueeze(-1) * self.left.to(base.dtype)
        right = self.inner.to(base.dtype).unsqueeze(-1) * self.right[..., :columns].to(base.dtype)
        return base.add_(left @ right, alpha=strength)

    def part(self, start: int, stop: int) -> Self:
        left = None if self.left is None else self.left[..., start:stop, :]
        return replace(self, scales=self.scales[..., start:stop], left=left)

    def swapped(self) -> Self:
        half = self.rows // 2
        left = None if self.left is None else self.left.roll(half, -2)
        return replace(self, scales=self.scales.roll(half, -1), left=left)


@lru_cache(maxsize=1)
def _drawn(rank: int, seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(left, right) as PEFT draws them (`tuners/vera/model.py: _kaiming_init`)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    right = uniform(rank, columns)
    return uniform(rows, rank), right


ALGORITHM = Vera
