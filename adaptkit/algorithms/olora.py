"""OLoRA: a LoRA trained from the leading columns of the QR decomposition of the base weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._rebased import Rebased

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Olora(Rebased):
    """W' = W + scale · (up · down − Q_r R_r) with W = QR, r columns of Q and r rows of R.

    Büyükakyüz, arXiv:2406.01775; PEFT `tuners/lora/layer.py: olora_init`, which multiplies the
    first factors by the scale, unlike PiSSA.
    """

    name: ClassVar[str] = "olora"
    title: ClassVar[str] = "OLoRA (init_lora_weights = olora)"

    def taken(self, base: Tensor, rank: int) -> Tensor:
        import torch

        q, r = torch.linalg.qr(base)
        product: Tensor = self.scale * (q[..., :rank] @ r[..., :rank, :])
        return product


ALGORITHM = Olora
