"""OFT of sd-scripts, `oft_unet_` files; in FLUX.1 the parts of a fused layer have own blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import COLUMNS, cayley, column_blocks, toward
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

PARTS = ("part0", "part1", "part2", "part3")


@record
class KohyaOft(Weights):
    """W' = blockdiag(R)ᵀ W, part by part.   blocks of a part: (..., n, b, b), its rows = n·b

    R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ, whose norm over one part is bounded by alpha · rows of
    that part (sd-scripts `networks/oft.py` and `networks/oft_flux.py`, whose sum over
    `k n m, k n p` transposes R). There is always an alpha, and with 0 nothing turns.
    """

    name: ClassVar[str] = "kohya-oft"
    title: ClassVar[str] = "OFT of sd-scripts"
    additive: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        blocks=Role("oft_blocks"),
        **{part: Role(f"oft_blocks.{n}") for n, part in enumerate(PARTS)},
        alpha=Role(ALPHA),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"blocks"}),
        *(frozenset(PARTS[: n + 1]) for n in range(len(PARTS))),
    )

    blocks: tuple[Tensor, ...]
    bound: float = 0.0
    whole: bool = True  # stored without a number

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        rows = 0
        for role, shape in shapes.items():
            matched(len(shape) == 3 and shape[1] == shape[2], role, shapes)
            rows += shape[0] * shape[1]
        if alpha is None:
            raise NotRepresentable(
                "an OFT of sd-scripts is bounded by its alpha, and this one has none"
            )
        return Facts(rows, 0, None, None, alpha.value)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        parts = tuple(tensors[role] for role in ("blocks", *PARTS) if role in tensors)
        return cls(parts, facts.scale, "blocks" in tensors)

    def encode(self) -> dict[str, Tensor]:
        import torch

        names = ("blocks",) if self.whole else PARTS
        stored = dict(zip(names, self.blocks, strict=False))
        return {**stored, ALPHA: torch.tensor(self.bound, dtype=torch.float32)}

    @property
    def rows(self) -> int:
        return sum(int(part.shape[-3] * part.shape[-1]) for part in self.blocks)

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a rotation changes depends on the weight", hint="merge it into its checkpoint"
        )

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        start = 0
        for blocks in self.blocks:
            n, b = blocks.shape[-3], blocks.shape[-1]
            flat = blocks.reshape(-1, n, b, b)
            turns = torch.stack([cayley(one, self.bound * n * b) for one in flat]).to(base.dtype)
            turns = turns.reshape(blocks.shape).mT
            for columns in column_blocks(base):
                rows = base[..., start : start + n * b, columns]
                cut = rows.reshape(*rows.shape[:-2], n, b, rows.shape[-1])
                toward(rows, (turns @ cut).reshape(rows.shape), strength)
            start += n * b
        return base

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 8 * min(rows * columns, COLUMNS)

    def folded(self) -> Self:
        return self

    def part(self, start: int, stop: int) -> Self:
        """Exact for whole parts, since each has a bound of its own."""
        kept, ends, end = [], {0}, 0
        for blocks in self.blocks:
            end += int(blocks.shape[-3] * blocks.shape[-1])
            ends.add(end)
            if start < end <= stop:
                kept.append(blocks)
        if not {start, stop} <= ends:
            raise NotRepresentable(f"rows {start} to {stop} cut through a part that has one bound")
        return replace(self, blocks=tuple(kept))


ALGORITHM = KohyaOft
