"""BOFT: butterfly stages of small rotations over the output rows, then perhaps a rescaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import Rotation
from adaptkit.algorithms._stored import Facts, Shapes, Stated, matched

if TYPE_CHECKING:
    from torch import Tensor


@record
class Boft(Rotation):
    """W' = rescale · B_m ⋯ B_1 W.   blocks: (..., m, n, b, b), rows = n·b   rescale: (..., rows, 1)

    Stage i groups rows 2ⁱ·b/2 apart and turns each group of b by R = (I + Q)(I − Q)⁻¹ with
    Q = B − Bᵀ. The norm of all Q together is bounded by alpha · rows, unless alpha is 0 (Liu et
    al., arXiv:2311.06243; LyCORIS 4.1.3 `functional/boft.py`).
    """

    name: ClassVar[str] = "boft"
    title: ClassVar[str] = "BOFT"
    turn_copies: ClassVar[float] = 4.2
    dims: ClassVar[int] = 4

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        found = super().facts(shapes, alpha)
        stages, count, size = shapes["blocks"][:3]
        # the last stage groups blocks 2ᵐ⁻¹ apart, halves of them
        whole = stages > 0 and size % 2 == 0 and count % 2 ** (stages - 1) == 0
        matched(whole, "blocks", shapes)
        return found

    def turned(self, turns: Tensor, weight: Tensor) -> Tensor:
        b, columns = turns.shape[-1], weight.shape[-1]
        for stage, turn in enumerate(turns):
            apart = 2**stage * (b // 2)
            grouped = weight.reshape(-1, 2, apart, columns).transpose(1, 2).reshape(-1, b, columns)
            turned = (turn @ grouped).reshape(-1, apart, 2, columns)
            weight = turned.transpose(1, 2).reshape(weight.shape)
        return weight


ALGORITHM = Boft
