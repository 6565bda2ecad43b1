"""OFT of PEFT: packed generators of rotations of the columns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._parts import same
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import SCRATCH, matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class PeftOft(Weights):
    """W' = W · blockdiag(R)ᵀ.   packed: (..., n, b(b−1)/2), columns = n·b

    With n = 1 one block serves all columns. Q is skew-symmetric with `packed` above its diagonal,
    and R = I + 2Q + 2Q² + 2Q³ + Q⁴, the Cayley–Neumann series of five terms, which is PEFT's
    default (huggingface/peft `tuners/oft/layer.py`, checked with 0.21.2). The columns of a
    convolution are its inputs with their kernel positions, as in `flatten(1)`: so PEFT merges it.
    Its forward pass adds up overlapping windows instead, which no weight can do.

    OneTrainer's `scaled_oft` means that `packed` is divided by 2√(b − 1) first
    (`modules/module/oft_utils.py`).
    """

    name: ClassVar[str] = "peft-oft"
    title: ClassVar[str] = "OFT of PEFT"
    peft_type: ClassVar[str] = "OFT"
    peft_kept: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        packed=Role("oft_R.weight", ("oft_R",)), scaled=Role("oft_R.scaled_oft")
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"packed"}),
        frozenset({"packed", "scaled"}),
    )

    packed: Tensor
    size: int
    scaled: Tensor | None = None  # OneTrainer's mark
    turn: Tensor | None = None  # R (..., n, b, b), once it is computed

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        shape = shapes["packed"]
        size = _size(shape[-1])
        matched(len(shape) == 2 and size > 0, "packed", shapes)
        return Facts(0, shape[0] * size if shape[0] > 1 else 0, None, None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        packed = tensors["packed"]
        return cls(packed, _size(packed.shape[-1]), tensors.get("scaled"))

    def encode(self) -> dict[str, Tensor]:
        return (
            {"packed": self.packed}
            if self.scaled is None
            else {"packed": self.packed, "scaled": self.scaled}
        )

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """`r` and `oft_block_size` of the source stay: which of them it states tells the other."""
        if any("scaled" in module.shapes for module in modules):
            raise NotRepresentable(
                "PEFT does not know the mark scaled_oft of OneTrainer",
                hint="--algo full with --base CHECKPOINT writes what it changes",
            )
        if "oft_block_size" in modules[0].config:
            return {}
        counts, sizes = zip(
            *((m.shapes["packed"][0], _size(m.shapes["packed"][1])) for m in modules), strict=True
        )
        shared = {"block_share": set(counts) == {1}}
        if len(set(sizes)) == 1:
            return {"r": 0, "oft_block_size": sizes[0], **shared}
        return {"r": one_for_all("the number of blocks", counts), "oft_block_size": 0, **shared}

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a rotation changes depends on the weight", hint="merge it into its checkpoint"
        )

    def computed(self) -> Self:
        from adaptkit.linalg.precision import compute_dtype

        return replace(self, turn=self._turn(compute_dtype(self.packed)))

    def _turn(self, dtype: torch.dtype) -> Tensor:
        if self.turn is not None and self.turn.dtype == dtype:
            return self.turn
        import torch

        b, packed = self.size, self.folded().packed.to(dtype)
        above = torch.triu_indices(b, b, 1, device=packed.device)
        skew = packed.new_zeros(*packed.shape[:-1], b, b)
        skew[..., above[0], above[1]] = packed
        skew = skew - skew.mT
        square = skew @ skew
        eye = torch.eye(b, dtype=dtype, device=packed.device)
        return eye + 2 * skew + 2 * square + 2 * square @ skew + square @ square

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 10 * min(rows * columns, SCRATCH)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        turn, b = self._turn(base.dtype), self.size
        cut = base.reshape(*base.shape[:-1], -1, b).transpose(-2, -3)  # (..., n, rows, b)
        merged = (cut @ turn.mT).transpose(-2, -3).reshape(base.shape)
        return toward(base, merged, strength)

    def folded(self) -> Self:
        """The same generators without OneTrainer's mark, as PEFT reads them."""
        from adaptkit.linalg.precision import upcast

        if self.scaled is None:
            return self
        return replace(
            self, packed=upcast(self.packed) / (2 * math.sqrt(self.size - 1)), scaled=None
        )

    def part(self, start: int, stop: int) -> Self:
        """The columns turn alike in all rows."""
        return self

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Exact for parts with the same rotation."""
        if all(
            same(part.packed, parts[0].packed) and same(part.scaled, parts[0].scaled)
            for part in parts
        ):
            return parts[0]
        raise NotRepresentable(
            "rows whose columns are turned differently cannot be fused",
            hint="merge them into their checkpoint",
        )

    def swapped(self) -> Self:
        return self


def _size(elements: int) -> int:
    """b with b(b−1)/2 = elements; 0 if there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


ALGORITHM = PeftOft
