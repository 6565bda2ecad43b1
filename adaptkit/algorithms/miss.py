"""MiSS and Bone: one block of numbers, repeated along the inputs of the weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted, one_for_all
from adaptkit.algorithms._settings import CONFIG_HINT, Unsettled
from adaptkit.algorithms._stored import SCRATCH, matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted


@record
class Miss(OfPeft, Applied):
    """W'[o, i] = W[o, i] + block[i mod r, o].   block: (..., r, m)

    A block of fewer columns than the weight has rows is repeated along them (`mini`). A block
    (..., m/r, r, r) is of the kind `bat`: W'_[o, i] = W_[o, i] (I + block_[o]) + block_[o] for the
    r × r pieces of W (Kang and Yin, arXiv:2409.15371; huggingface/peft `tuners/miss/layer.py`,
    checked with 0.21.2). PEFT called it Bone before. Of linear layers only. The file does not tell
    the number of inputs, so it is applied to the weight.
    """

    name: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS"
    peft_type: ClassVar[str] = "MISS"
    linear: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(block=Role("miss_block", ("bone_block",)))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"block"}),)

    repeated: Tensor
    bat: bool = False

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["block"]
        bat = len(shape) == 3 and shape[1] == shape[2]
        matched((len(shape) == 2 or bat) and 0 not in shape, "block", shapes)
        rows, rank = (shape[0] * shape[1], shape[2]) if bat else (0, shape[0])
        return Facts(rows, 0, (), rank, 1.0, settings=(bat,))

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        whole = wanted.config is not None and wanted.config.get("init_weights") != "mini"
        return replace(facts, rows=wanted.shapes["block"][1]) if whole and not facts.rows else facts

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["block"], bool(facts.settings[0]))

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 12 * min(rows * columns, SCRATCH)

    def encode(self) -> dict[str, Tensor]:
        return {"block": self.repeated}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """A file alone does not tell a repeated block (`mini`) from one of all rows."""
        bat = one_for_all("init_weights", (bool(m.facts.settings[0]) for m in modules))
        found = counted(modules, "r", role="block", axis=-1 if bat else 0)
        if bat:
            return {**found, "init_weights": "bat"}
        blocks = [m.shapes["block"][1] for m in modules]
        if all(m.facts.rows == size for m, size in zip(modules, blocks, strict=True)):
            usual = modules[0].config.get("init_weights")
            return {**found, "init_weights": True if usual in (None, "mini", "bat") else usual}
        stated = all(m.config.get("init_weights") == "mini" or m.facts.rows for m in modules)
        if not stated:
            raise Unsettled(
                "a block of MiSS does not tell how often it is repeated", hint=CONFIG_HINT
            )
        return {**found, "init_weights": "mini", "mini_r": one_for_all("mini_r", blocks)}

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, repeated=upcast(self.repeated) * factor)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        rank, rows, columns = self.repeated.shape[-2], *base.shape[-2:]
        block = self.repeated.to(base.dtype)
        if self.bat:
            self._fitting(columns % rank == 0 and rows == rank * self.repeated.shape[-3], base)
            some = max(1, SCRATCH // (rank * columns))
            for start in range(0, rows // rank, some):
                own = block[..., start : start + some, :, :].unsqueeze(-3)
                part = base[..., start * rank : (start + some) * rank, :]
                cut = part.reshape(*part.shape[:-2], -1, rank, columns // rank, rank)
                pieces = cut.transpose(-2, -3)  # (..., m/r, n/r, r, r)
                added = (pieces @ own).add_(own).transpose(-2, -3)
                part.add_(added.reshape(part.shape), alpha=strength)
            return base
        self._fitting(rows % block.shape[-1] == 0, base)
        plain = block.mT.repeat(*(1,) * (block.ndim - 2), rows // block.shape[-1], 1)
        for start in range(0, columns, rank):
            piece = base[..., start : start + rank]
            piece.add_(plain[..., : piece.shape[-1]], alpha=strength)
        return base

    def part(self, start: int, stop: int) -> Self:
        size = self.repeated.shape[-1]
        if not self.bat and stop <= size:
            return replace(self, repeated=self.repeated[..., start:stop])
        if self.bat and start % size == 0 and stop % size == 0:
            return replace(self, repeated=self.repeated[..., start // size : stop // size, :, :])
        return super().part(start, stop)


ALGORITHM = Miss
