"""OLoRA: a LoRA trained from the leading columns of the QR decomposition of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._rebased import Rebased
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import SCRATCH

if TYPE_CHECKING:
    from torch import Tensor


@record
class Olora(Rebased):
    """W' = W + scale · (up · down − Q_r R_r) with W = QR, r columns of Q and r rows of R.

    Büyükakyüz, arXiv:2406.01775; PEFT `tuners/lora/layer.py: olora_init`, which multiplies the
    first factors by the scale, unlike PiSSA.
    """

    name: ClassVar[str] = "olora"
    title: ClassVar[str] = "OLoRA (init_lora_weights = olora)"

    def taken(self, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        import torch

        # the first columns of Q are those of the first columns of W
        q = torch.linalg.qr(base[..., :rank]).Q
        return self.scale * q, q.mT @ base

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 4 * min(rows * columns, SCRATCH)


ALGORITHM = Olora
