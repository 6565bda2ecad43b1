"""LoHa: the Hadamard product of two low-rank products, perhaps with Tucker cores."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._factor import Factor, Product, Tucker, low_rank, tucker_field
from adaptkit.algorithms._parts import grouped, same, stacked, unique
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import matched, roles, scaling
from adaptkit.algorithms.contract import ALPHA, Facts, Role, Shapes, Stated, Weights
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

PLAIN = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})


@record
class Loha(Weights):
    """ΔW = scale · (W1 ∘ W2).   W1 = w1_a · w1_b: (..., m, n)   W2 = w2_a · w2_b: (..., m, n)

    scale is alpha / rank (FedPara, arXiv:2108.06098; LyCORIS `modules/loha.py`, its forward pass).
    With `t1` and `t2`, W[o, i, k] = Σ w_a[p, o] t[p, q, k] w_b[q, i]; `w_a` is stored transposed
    (LyCORIS `functional/loha.py`).
    """

    name: ClassVar[str] = "loha"
    stacks: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    title: ClassVar[str] = "LoHa"
    resized: ClassVar[str | None] = "lora"
    peft_type: ClassVar[str] = "LOHA"
    peft_lacks: ClassVar[Mapping[int, str]] = MappingProxyType({3: ""})
    roles: ClassVar[Mapping[str, Role]] = roles(
        **{role: Role(f"hada_{role}") for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        alpha=Role(ALPHA),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (PLAIN, PLAIN | {"t1", "t2"})

    w1: Factor
    w2: Factor
    scale: float
    kernel: tuple[int, ...] | None = ()

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        one, two = (_sizes(shapes, side) for side in "12")
        matched(one == two, " ".join(cls.roles), shapes)
        rows, columns, kernel = one
        rank = shapes["w1_b"][0]
        return Facts(rows, columns, kernel, rank, scaling(alpha, rank))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        batch = tensors["w1_b"].ndim - 2
        return cls(
            _side(tensors, "1", batch), _side(tensors, "2", batch), facts.scale, facts.kernel
        )

    def encode(self) -> dict[str, Tensor]:
        import torch

        stored: dict[str, Tensor] = {}
        for side, factor in (("1", self.w1), ("2", self.w2)):
            match factor:
                case Tucker(core, left, right):
                    shape = (*core.shape[:-1], *(self.kernel or ()))
                    stored[f"t{side}"] = core.reshape(shape)
                    stored |= {f"w{side}_a": left.transpose(-1, -2), f"w{side}_b": right}
                case Product(left, right):
                    stored |= {f"w{side}_a": left, f"w{side}_b": right}
        rank = stored["w1_b"].shape[-2]
        stored[ALPHA] = torch.tensor(self.scale * rank, dtype=torch.float32)
        return stored

    def delta(self) -> Tensor:
        from adaptkit.linalg.precision import row_blocks

        whole = self.w1.dense().mul_(self.scale)
        for rows in row_blocks(whole):  # the second product is never in memory as a whole
            whole[..., rows, :].mul_(_rows(self.w2, rows).dense())
        return whole

    @property
    def rows(self) -> int:
        return self.w1.rows

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A1 B1) ∘ (A2 B2) = (A1 • A2)(B1 ⊙ B2), of rank r².

        • multiplies all pairs of columns, ⊙ all pairs of rows.
        """
        (a1, b1), (a2, b2) = low_rank(self.w1), low_rank(self.w2)
        left = (a1.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2) * self.scale
        right = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2)
        return left, right

    def computed(self) -> Self:
        one, two = (Product(*low_rank(factor)) for factor in (self.w1, self.w2))
        return replace(self, w1=one, w2=two)

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        return (facts.rank or 1) ** 2

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Block-diagonal in both products; parts of one weight share its columns."""
        import torch

        if len({part.scale for part in parts}) > 1:
            parts = [part.folded() for part in parts]
        if all(_alike(part.w1, parts[0].w1) and _alike(part.w2, parts[0].w2) for part in parts):
            groups = [0] * len(parts)
        elif all(isinstance(factor, Product) for part in parts for factor in (part.w1, part.w2)):
            rights = [(_right(part.w1), _right(part.w2)) for part in parts]
            groups = grouped([torch.cat(pair, -1) for pair in rights])
        else:
            raise NotRepresentable(
                "LoHa with different Tucker cores cannot be fused", hint="use --algo full"
            )
        sides = []
        for factors in ([part.w1 for part in parts], [part.w2 for part in parts]):
            left = stacked([_left(factor) for factor in factors], groups)
            right = torch.cat(unique([_right(factor) for factor in factors], groups), -2)
            sides.append(replace(factors[0], left=left, right=right))  # type: ignore[type-var]
        return replace(parts[0], w1=sides[0], w2=sides[1])

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        return replace(like, w1=_empty(like.w1, rows), w2=_empty(like.w2, rows))

    def folded(self) -> Self:
        """The scale is multiplied into `w1_a`."""
        from adaptkit.linalg.precision import upcast

        if self.scale == 1.0:
            return self
        left = upcast(self.w1.left) * self.scale  # type: ignore[attr-defined]
        return replace(self, w1=replace(self.w1, left=left), scale=1.0)  # type: ignore[type-var]

    def times(self, factor: float) -> Self:
        """The scale takes the number, `w1_a` its sign."""
        left = self.w1.left  # type: ignore[attr-defined]
        w1 = replace(self.w1, left=-left if factor < 0 else left)  # type: ignore[type-var]
        return replace(self, w1=w1, scale=self.scale * abs(factor))

    @classmethod
    def peft_fields(cls, modules: Sequence[Shapes]) -> dict[str, Any]:
        return tucker_field(modules)

    def part(self, start: int, stop: int) -> Self:
        one, two = (_rows(factor, slice(start, stop)) for factor in (self.w1, self.w2))
        return replace(self, w1=one, w2=two)


def _sizes(shapes: Shapes, side: str) -> tuple[int, int, tuple[int, ...] | None]:
    """(rows, columns, kernel) of one product; a flat `w_b` does not tell its kernel."""
    a, b, core = shapes[f"w{side}_a"], shapes[f"w{side}_b"], shapes.get(f"t{side}")
    names = f"t{side} w{side}_a w{side}_b"
    matched(len(a) == len(b) == 2 and b[0] > 0, names, shapes)
    if core is None:
        matched(a[1] == b[0], names, shapes)
        return a[0], b[1], None
    matched(len(core) > 2 and core[0] == a[0] and core[1] == b[0], names, shapes)
    return a[1], b[1] * math.prod(core[2:]), core[2:]


def _side(tensors: Mapping[str, Tensor], side: str, batch: int) -> Factor:
    a, b, core = tensors[f"w{side}_a"], tensors[f"w{side}_b"], tensors.get(f"t{side}")
    if core is None:
        return Product(a, b)
    return Tucker(core.reshape(*core.shape[: batch + 2], -1), a.transpose(-1, -2), b)


def _left(factor: Factor) -> Tensor:
    assert isinstance(factor, Product | Tucker)
    return factor.left


def _right(factor: Factor) -> Tensor:
    assert isinstance(factor, Product | Tucker)
    return factor.right


def _alike(one: Factor, other: Factor) -> bool:
    """Whether two factors differ in nothing but their rows."""
    if type(one) is not type(other):
        return False
    parts = ("core", "right") if isinstance(one, Tucker) else ("right",)
    return all(same(getattr(one, part), getattr(other, part)) for part in parts)


def _empty(factor: Factor, rows: int) -> Factor:
    left = _left(factor)
    zeros = left.new_zeros(*left.shape[:-2], rows, left.shape[-1])
    return replace(factor, left=zeros)  # type: ignore[type-var]


def _rows(factor: Factor, cut: slice) -> Factor:
    match factor:
        case Product(left, right):
            return Product(left[..., cut, :], right)
        case Tucker(core, left, right):
            return Tucker(core, left[..., cut, :], right)
    raise TypeError(type(factor).__name__)


ALGORITHM = Loha
