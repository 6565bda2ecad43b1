"""DEFT and PaRa: a subspace of the outputs is taken away, and perhaps replaced."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft, number
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class Deft(OfPeft, Applied):
    """ΔW = left · (scale · added − rightᵀ W).   directions: (..., m, r)   added: (..., r, n)

    left = right = Q of directions = QR (`qr`), or left = directions and right = its positive
    entries (`relu`). Without `added` (PaRa) it is 0. scale is alpha / r, or 1 without alpha (PaRa:
    Chen et al., ICLR 2025; huggingface/peft `tuners/deft/layer.py`, checked with 0.21.2). Of linear
    layers only.
    """

    name: ClassVar[str] = "deft"
    title: ClassVar[str] = "DEFT"
    peft_type: ClassVar[str] = "DEFT"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"decomposition_method": "relu", "alpha": None}
    )
    roles: ClassVar[Mapping[str, Role]] = roles(directions=Role("deft_P"), added=Role("deft_R"))
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"directions"}),
        frozenset({"directions", "added"}),
    )

    directions: Tensor
    added: Tensor | None
    scale: float
    orthogonal: bool

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        directions = shapes["directions"]
        fits = len(directions) == 2 and 0 < directions[1] <= directions[0]
        columns = 0
        if fits and "added" in shapes:
            added = shapes["added"]
            fits, columns = len(added) == 2 and added[0] == directions[1], added[-1]
        matched(fits, "directions added", shapes)
        return Facts(directions[0], columns, (), directions[1], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        method, alpha = said["decomposition_method"], said["alpha"]
        if method not in ("qr", "relu"):
            raise NotRepresentable(f"adapter_config.json: decomposition_method is {method!r}")
        scale = number(alpha, "alpha") / (facts.rank or 1) if alpha else 1.0
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: alpha is {alpha}")
        return replace(facts, scale=scale, settings=(method == "qr",))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(
            tensors["directions"], tensors.get("added"), facts.scale, bool(facts.settings[0])
        )

    def encode(self) -> dict[str, Tensor]:
        added = {} if self.added is None else {"added": self.added}
        return {"directions": self.directions, **added}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """PEFT takes fewer directions of a layer with less than r rows."""
        para = one_for_all("para", ("added" not in m.shapes for m in modules))
        stated = one_for_all("r", (m.config.get("r") for m in modules))
        if isinstance(stated, int) and all(
            m.facts.rank == min(stated, m.facts.rows) for m in modules
        ):
            return {"para": para, "r": stated}
        return {"para": para, "r": one_for_all("rank", (m.facts.rank for m in modules))}

    @property
    def rows(self) -> int:
        return int(self.directions.shape[-2])

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        self._fitting(base.shape[-2] == self.rows, base)
        left = right = self.directions.to(base.dtype)
        if self.orthogonal:
            left = right = torch.linalg.qr(left).Q
        else:
            right = right.relu()
        change = -(right.mT @ base)
        if self.added is not None:
            change.add_(self.added.to(base.dtype), alpha=self.scale)
        return base.add_(left @ change, alpha=strength)


ALGORITHM = Deft
