"""T-LoRA: a product of three factors, from which the one it started with is subtracted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, Unwritten
from adaptkit.algorithms._record import record
from adaptkit.algorithms._start import leading, leading_bytes, with_product
from adaptkit.algorithms._stored import flat, matched, roles, scaling
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@record
class Tlora(Unwritten, Applied):
    """ΔW = scale · (up · diag(values) · down − W_r).

    up: (..., m, r)   values: (..., r)   down: (..., r, n)

    scale is alpha / rank, W_r the best approximation of W of rank r, from which the factors started
    (Soboleva et al., arXiv:2507.05964; LyCORIS 4.1.3 `modules/tlora.py`, which saves no start and
    takes it from the weight when it loads a file). All ranks count, as they do at the last steps of
    the sampling. Of a convolution, those of 1×1 alone: what LyCORIS makes of others is no weight.
    """

    name: ClassVar[str] = "tlora"
    title: ClassVar[str] = "T-LoRA"
    caveat: ClassVar[str] = (
        "a T-LoRA is taken to have started from the leading singular vectors of the weight, as "
        "LyCORIS takes it; the file does not tell another start (sig_type, use_data_init)"
    )
    roles: ClassVar[Mapping[str, Role]] = roles(
        up=Role("p_layer.weight"),
        down=Role("q_layer.weight"),
        values=Role("lambda_layer"),
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
        fits = len(up) == len(down) >= 2 and up[1] == down[0] == math.prod(values) > 0
        matched(fits and math.prod((*up[2:], *down[2:])) == 1, "up values down", shapes)
        return Facts(up[0], down[1], down[2:], down[0], scaling(alpha, down[0]))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        own = 2 + len(facts.kernel or ())
        up, down = flat(tensors["up"], own), flat(tensors["down"], own)
        return cls(up, down, tensors["values"].reshape(*down.shape[:-1]), facts.scale)

    @property
    def rows(self) -> int:
        return int(self.up.shape[-2])

    applying_wide: ClassVar[int] = 1  # float64 in any case

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return leading_bytes(rows, columns)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        found = leading(base, self.values.shape[-1])
        up, down, values = (t.to(base.dtype) for t in (self.up, self.down, self.values))
        left = torch.cat([up * values.unsqueeze(-2), -found.u * found.s.unsqueeze(-2)], -1)
        right = torch.cat([down, found.vh], -2)
        return with_product(base, left, right, strength * self.scale)

    def folded(self) -> Self:
        return self

    def swapped(self) -> Self:
        """The start of exchanged rows is the exchanged start."""
        return replace(self, up=self.up.roll(self.rows // 2, -2))


ALGORITHM = Tlora
