"""VB-LoRA: a LoRA of pieces, each a mixture of a few vectors of one bank for the model."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import OfPeft, count
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted, one_for_all
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable, ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted

PLAIN = frozenset({"down", "up"})
CHOSEN = frozenset({"down_where", "down_share", "up_where", "up_share"})


@record
class VbLora(OfPeft):
    """ΔW = B A; each piece of length l of a row of A or a column of B is a mixture of the bank.

    bank: (..., h, l)   down: (..., r, n/l, h)   up: (..., m/l, r, h)

    A mixture takes the `topk` vectors of the largest logits (`down`, `up`), weighted by softmax of
    those. Or the vectors are stored (`…_where`, (…, k)) with all weights but the last (`…_share`,
    (…, k − 1)), and all weights of a mixture add up to 1 (Li et al., arXiv:2405.15179;
    huggingface/peft `tuners/vblora`, checked with 0.21.2). `bank` is stored once. Of linear layers
    only.
    """

    name: ClassVar[str] = "vblora"
    title: ClassVar[str] = "VB-LoRA"
    peft_type: ClassVar[str] = "VBLORA"
    resized: ClassVar[str | None] = "lora"
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({"topk": 2})
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({"bank": "vblora_vector_bank"})
    roles: ClassVar[Mapping[str, Role]] = roles(
        down=Role("vblora_logits_A"),
        up=Role("vblora_logits_B"),
        down_where=Role("vblora_logits_A_topk_indices", integers=True),
        down_share=Role("vblora_logits_A_topk_weights", wide=True),
        up_where=Role("vblora_logits_B_topk_indices", integers=True),
        up_share=Role("vblora_logits_B_topk_weights", wide=True),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (PLAIN, CHOSEN)

    bank: Tensor
    stored: tuple[tuple[str, Tensor], ...]  # the tensors of the layer by role
    most: int
    factor: float = 1.0  # of a ΔW that becomes another kind

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        bank, chosen = shapes.get("bank", ()), "up_where" in shapes
        down, up = (shapes[f"{side}_where" if chosen else side] for side in ("down", "up"))
        fits = len(bank) == 2 and len(down) == len(up) == 3 and down[0] == up[1] > 0
        fits = fits and down[2] == up[2] and (chosen or down[2] == bank[0])
        for side in ("down", "up") if chosen else ():
            where, share = shapes[f"{side}_where"], shapes[f"{side}_share"]
            fits = fits and share == (*where[:2], where[2] - 1)
        matched(fits, " ".join(shapes), shapes)
        return Facts(up[0] * bank[1], down[1] * bank[1], (), down[0], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        if "up_where" in wanted.shapes:
            return replace(facts, settings=(wanted.shapes["up_where"][2],))
        most = count(cls.stated(wanted)["topk"], "topk")
        if not 0 < most <= wanted.shapes["up"][2]:
            raise NotRepresentable(f"adapter_config.json: topk is {most}")
        return replace(facts, settings=(most,))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        own = tuple((role, tensor) for role, tensor in tensors.items() if role != "bank")
        return cls(tensors["bank"], own, facts.settings[0])

    def encode(self) -> dict[str, Tensor]:
        if self.factor != 1.0:
            raise NotRepresentable(
                f"a VB-LoRA cannot be multiplied by {self.factor:g}: its mixtures add up to 1",
                hint="--algo lora can",
            )
        return {"bank": self.bank, **dict(self.stored)}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        vectors, length = modules[0].shapes["bank"]
        return {
            **counted(modules, "r"),
            "num_vectors": vectors,
            "vector_length": length,
            "topk": one_for_all("topk", (m.facts.settings[0] for m in modules)),
            "save_only_topk_weights": one_for_all(
                "save_only_topk_weights", ("up_where" in m.shapes for m in modules)
            ),
        }

    def _mixed(self, side: str) -> Tensor:
        """The mixtures of A, (..., r, n/l, l), or B, (..., m/l, r, l)."""
        import torch

        from adaptkit.linalg.precision import upcast

        own, bank = dict(self.stored), upcast(self.bank)
        if side in own:
            logits, where = upcast(own[side]).topk(self.most, -1)
            weights = logits.softmax(-1)
        else:
            where, share = own[f"{side}_where"].long(), upcast(own[f"{side}_share"])
            weights = torch.cat([share, 1 - share.sum(-1, keepdim=True)], -1)
            if not 0 <= int(where.min()) <= int(where.max()) < bank.shape[-2]:
                raise ShapeMismatch(f"a vector beyond the {bank.shape[-2]} of the bank")
        dense = weights.new_zeros(*weights.shape[:-1], bank.shape[-2])
        dense.scatter_(-1, where, weights)
        return dense @ (bank if bank.ndim == 2 else bank.unsqueeze(-3))

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self._mixed("down"), self._mixed("up")
        return up.transpose(-1, -2).flatten(-3, -2) * self.factor, down.flatten(-2)

    @property
    def rows(self) -> int:
        tensor = next(tensor for role, tensor in self.stored if role.startswith("up"))
        return int(tensor.shape[-3] * self.bank.shape[-1])

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def times(self, factor: float) -> Self:
        return replace(self, factor=self.factor * factor)


ALGORITHM = VbLora
