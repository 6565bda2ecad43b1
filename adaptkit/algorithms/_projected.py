"""One random product for the whole model, scaled by two vectors in each layer (VeRA)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._drawn import kaiming
from adaptkit.algorithms._foreign import Applied, OfPeft, seed
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._stored import matched
from adaptkit.algorithms.contract import Facts, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted

__all__ = ["Projected"]

STORED = frozenset({"rows", "inner", "left", "right"})


@record
class Projected(OfPeft, Applied):
    """ΔW = diag(scales) · left[:m] · diag(inner) · right[:, :n].

    scales: (..., m)   inner: (..., r)   left: (..., M, r)   right: (..., r, N)

    left and right are one pair for the model, of the size of its largest layer. A file without them
    (`save_projection = False`) states the seed that they are drawn from, right before left,
    uniformly within ±√(6 / n), n the columns of each; they need M and N, the most rows and columns
    of all layers with an adapter. Of `inner` and right, a kind may store `parts` as many rows, of
    which the first r count. Of linear layers only.
    """

    linear: ClassVar[bool] = True
    drawn_whole: ClassVar[bool] = True
    parts: ClassVar[int] = 1
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"projection_prng_key": 0})
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"rows", "inner"}),)

    scales: Tensor
    inner: Tensor
    left: Tensor | None  # None where the sizes of the model are not known
    right: Tensor | None
    saved: bool = False  # whether the file holds them

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        rows, inner = shapes["rows"], shapes["inner"]
        fits = len(rows) == len(inner) == 1 and 0 not in (*rows, *inner)
        fits = fits and inner[0] % cls.parts == 0
        if fits and shapes.keys() == STORED:
            left, right = shapes["left"], shapes["right"]
            fits = len(left) == len(right) == 2 and left[1] * cls.parts == right[0] == inner[0]
            fits = fits and left[0] >= rows[0]
        fits = fits and ("left" in shapes) == ("right" in shapes)
        matched(fits, "rows inner left right", shapes)
        return Facts(rows[0], 0, (), inner[0] // cls.parts, 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        if wanted.shapes.keys() == STORED:
            return facts
        drawn = seed(cls.stated(wanted)["projection_prng_key"], "projection_prng_key")
        return replace(facts, settings=(drawn,))

    @classmethod
    def beside(cls, facts: Facts, rows: int, columns: int) -> Facts:
        if not facts.settings:
            return facts
        return replace(facts, settings=(facts.settings[0], rows, columns))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        rows, inner = tensors["rows"], tensors["inner"]
        if "left" in tensors:
            return cls(rows, inner, tensors["left"], tensors["right"], saved=True)
        if len(facts.settings) < 3:
            return cls(rows, inner, None, None)
        left, right = _drawn(int(facts.rank or 0), cls.parts, *facts.settings[:3])
        left, right = left.to(rows.device), right.to(rows.device)
        return cls(rows, inner, left, right)

    def encode(self) -> dict[str, Tensor]:
        found = {"rows": self.scales, "inner": self.inner}
        if self.saved and self.left is not None and self.right is not None:
            found |= {"left": self.left, "right": self.right}
        return found

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        saved = "left" in modules[0].shapes
        return {**counted(modules, "r"), "save_projection": saved}

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, scales=upcast(self.scales) * factor)

    @property
    def rows(self) -> int:
        return int(self.scales.shape[-1])

    def apply(self, base: Tensor, strength: float) -> Tensor:
        if (own := self._left) is None or self.right is None:
            raise NotRepresentable("its projections are drawn for a model of unknown size")
        columns = base.shape[-1]
        self._fitting(columns <= self.right.shape[-1] and self.rows == base.shape[-2], base)
        left = self.scales.to(base.dtype).unsqueeze(-1) * own.to(base.dtype)
        inner, right = self.inner.to(base.dtype), self.right[..., :columns].to(base.dtype)
        rank = inner.shape[-1] // self.parts
        right = inner[..., :rank].unsqueeze(-1) * right[..., :rank, :]
        return base.add_(left @ right, alpha=strength)

    @property
    def _left(self) -> Tensor | None:
        """The rows of `left` that this layer takes."""
        return None if self.left is None else self.left[..., : self.rows, :]

    def part(self, start: int, stop: int) -> Self:
        left = None if self.left is None else self.left[..., start:stop, :]
        return replace(self, scales=self.scales[..., start:stop], left=left)

    def swapped(self) -> Self:
        half = self.rows // 2
        left = None if self._left is None else self._left.roll(half, -2)
        return replace(self, scales=self.scales.roll(half, -1), left=left)


@lru_cache(maxsize=1)
def _drawn(rank: int, parts: int, seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(left, right) as PEFT draws them (`tuners/vera/model.py: _kaiming_init`)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    right = kaiming((rank * parts, columns), 0.0, generator, torch.float32)
    return kaiming((rows, rank), 0.0, generator, torch.float32), right
