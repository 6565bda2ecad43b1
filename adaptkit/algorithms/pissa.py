"""PiSSA: a LoRA trained from the leading singular values of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._rebased import Rebased
from adaptkit.algorithms._record import record
from adaptkit.algorithms._start import leading, leading_bytes

if TYPE_CHECKING:
    from torch import Tensor


@record
class Pissa(Rebased):
    """W' = W + scale · up · down − W_r, with W_r the best approximation of W of rank r.

    Meng et al., arXiv:2404.02948; PEFT `tuners/lora/layer.py: pissa_init`, whose factors times the
    scale are W_r at the start.
    """

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "PiSSA (init_lora_weights = pissa)"

    def taken(self, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        found = leading(base, rank)
        return found.u * found.s.unsqueeze(-2), found.vh

    applying_wide: ClassVar[int] = 1  # float64 in any case

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return leading_bytes(rows, columns)


ALGORITHM = Pissa
