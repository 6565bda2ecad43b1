"""LoKr: a Kronecker product of two small matrices, each full or of low rank."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._factor import (
    Dense,
    Factor,
    Product,
    Tucker,
    factor_svd,
    low_rank,
    same_factor,
    tucker_field,
)
from adaptkit.algorithms._kron_ladder import ladder_errors, ladder_errors_of_stack
from adaptkit.algorithms._kron_shapes import (
    Working,
    first_shape,
    full_from,
    second_factor,
    second_shape,
)
from adaptkit.algorithms._lora_cut import NOTHING
from adaptkit.algorithms._parts import grouped
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import roles, scaling
from adaptkit.algorithms.contract import (
    ALPHA,
    Decomposition,
    Facts,
    FitSpec,
    Role,
    Shapes,
    Stated,
    Weights,
)
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.linalg.lowrank import LowRank

# of a module: a smaller full first factor costs less than the error of cutting its rank
SMALL_PART = 0.25
GUESSED = 32  # swept over all SD shapes with lycoris-lora 4.1.3: it guesses every smaller factor
W1_FORMS = (("w1",), ("w1_a", "w1_b"))
W2_FORMS = (("w2",), ("w2_a", "w2_b"), ("t2", "w2_a", "w2_b"))


@record
class Lokr(Working, Weights):
    """ΔW = scale · (W1 ⊗ W2).   W1: (..., a, b)   W2: (..., c, d·K)

    out = a·c, in = b·d, K is the kernel size.
    scale is alpha / rank of the factor that is stored as a product. It is 1 if both factors are
    full, whatever alpha says: files exist with alpha = 1e10 there. LyCORIS (`modules/lokr.py`),
    ComfyUI and InvokeAI agree. PEFT always multiplies by alpha / r, so the r of a PEFT
    configuration counts.

    With `t2`, W2[c, d, k] = Σ w2_a[p, c] t2[p, q, k] w2_b[q, d]; `w2_a` is stored transposed. The
    kernel flattens as `flatten(1)` does, so kron(W1, W2.flatten(1)) is exact.
    """

    name: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    kron: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    resized: ClassVar[str | None] = "lokr"
    ladder_roles: ClassVar[tuple[str, str] | None] = ("w2_a", "w2_b")
    extractable: ClassVar[bool] = True
    fit_options: ClassVar[frozenset[str]] = frozenset({"factor", "decompose_both"})
    refits: ClassVar[bool] = True  # both factors together: the ladder fits w1 to a full w2
    against_low_rank: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LOKR"
    peft_lacks: ClassVar[Mapping[int, str]] = MappingProxyType({1: "w2", 3: ""})
    roles: ClassVar[Mapping[str, Role]] = roles(
        **{
            role: Role(f"lokr_{role}")
            for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        },
        alpha=Role(ALPHA),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset(one + two) for one, two in product(W1_FORMS, W2_FORMS)
    )

    w1: Factor
    w2: Factor
    scale: float
    kernel: tuple[int, ...] | None = ()

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        (a, b), rank1 = first_shape(shapes)
        (c, columns, kernel), rank2 = second_shape(shapes)
        # LyCORIS, ComfyUI and InvokeAI take the rank of w2, or that of w1 if w2 is full
        rank = rank2 or rank1
        # only a PEFT configuration gives two full factors a scale: PEFT always takes alpha / r
        divisor = rank or (alpha.rank if alpha else None)
        scale = scaling(alpha, divisor) if divisor else 1.0
        return Facts(a * c, b * columns, kernel, rank, scale)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        w1: Factor = (
            Dense(tensors["w1"]) if "w1" in tensors else Product(tensors["w1_a"], tensors["w1_b"])
        )
        return cls(w1, second_factor(tensors), facts.scale, facts.kernel)

    def encode(self) -> dict[str, Tensor]:
        import torch

        stored: dict[str, Tensor] = {}
        if isinstance(self.w1, Product):
            stored |= {"w1_a": self.w1.left, "w1_b": self.w1.right}
        elif isinstance(self.w1, Dense):
            # readers give two full factors scale 1, so any other scale goes into w1
            folded = self.rank is None and self.scale != 1.0
            stored["w1"] = self.w1.dense() * self.scale if folded else self.w1.matrix
        stored |= self._second_stored()
        # of two full factors: 1 suits readers that ignore alpha, and those that divide by rank 1
        alpha = 1.0 if self.rank is None else self.scale * self.rank
        stored[ALPHA] = torch.tensor(alpha, dtype=torch.float32)
        return stored

    def _second_stored(self) -> dict[str, Tensor]:
        match self.w2:
            case Dense(matrix):
                kernel = self.kernel or ()
                return {"w2": matrix.reshape(*matrix.shape[:-1], -1, *kernel)}
            case Product(left, right):
                return {"w2_a": left, "w2_b": right}
            case Tucker(core, left, right):
                shape = (*core.shape[:-1], *(self.kernel or ()))
                return {"t2": core.reshape(shape), "w2_a": left.transpose(-1, -2), "w2_b": right}
        raise TypeError(type(self.w2).__name__)

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None if both factors are full."""
        match self.w2:
            case Product(_, right) | Tucker(_, _, right):
                return int(right.shape[-2])
        return int(self.w1.right.shape[-2]) if isinstance(self.w1, Product) else None

    def delta(self) -> Tensor:
        from adaptkit.linalg.kron.blocks import kron

        return kron(self.w1.dense() * self.scale, self.w2.dense())

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """Block by block in place: ΔW is never formed."""
        from adaptkit.linalg.kron.blocks import kron_added

        one, two = self.w1.dense() * (self.scale * strength), self.w2.dense()
        return kron_added(base, one.to(base.dtype), two.to(base.dtype), 1.0, base)

    def part(self, start: int, stop: int) -> Self:
        """Rows of W1; exact if the cut falls between the blocks of W2."""
        c = self.w2.rows
        if start % c or stop % c:
            raise NotRepresentable(
                f"rows {start} to {stop} cut through a Kronecker block of {c} rows",
                hint="--algo lora or --algo full can hold it",
            )
        cut = slice(start // c, stop // c)
        if isinstance(self.w1, Product):
            return replace(self, w1=Product(self.w1.left[..., cut, :], self.w1.right))
        return replace(self, w1=Dense(self.w1.dense()[..., cut, :]))

    def norm_squared(self) -> float:
        """‖W1 ⊗ W2‖ = ‖W1‖ ‖W2‖."""
        one, two = (factor.dense().double().square().sum((-1, -2)) for factor in (self.w1, self.w2))
        return float((self.scale**2 * one * two).sum())

    @property
    def rows(self) -> int:
        return self.w1.rows * self.w2.rows

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """The rows of all W1, stacked; exact if all parts have the same W2."""
        import torch

        first = parts[0]
        if not all(same_factor(part.w2, first.w2) for part in parts):
            raise NotRepresentable(
                "LoKr with different second factors cannot be fused",
                hint="--algo lora or --algo full can hold it",
            )
        if len({part.scale for part in parts}) > 1:
            parts = [part.folded() for part in parts]
        rights = [part.w1.right for part in parts if isinstance(part.w1, Product)]
        if len(rights) == len(parts) and max(grouped(rights)) == 0:
            lefts = [part.w1.left for part in parts if isinstance(part.w1, Product)]
            return replace(parts[0], w1=Product(torch.cat(lefts, -2), rights[0]))
        return replace(parts[0], w1=Dense(torch.cat([_stored(part.w1) for part in parts], -2)))

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        if rows % like.w2.rows:
            raise NotRepresentable(
                f"{rows} missing rows are no multiple of a Kronecker block of {like.w2.rows}"
            )
        height = rows // like.w2.rows
        if isinstance(like.w1, Product):
            left = like.w1.left
            return replace(
                like,
                w1=Product(left.new_zeros(*left.shape[:-2], height, left.shape[-1]), like.w1.right),
            )
        w1 = _stored(like.w1)
        return replace(like, w1=Dense(w1.new_zeros(*w1.shape[:-2], height, w1.shape[-1])))

    def folded(self) -> Self:
        """The scale is multiplied into the first factor."""
        from adaptkit.linalg.precision import upcast

        if self.scale == 1.0:
            return self
        if isinstance(self.w1, Product):
            return replace(
                self, w1=Product(upcast(self.w1.left) * self.scale, self.w1.right), scale=1.0
            )
        return replace(self, w1=Dense(self.w1.dense() * self.scale), scale=1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(L1 R1) ⊗ (L2 R2) = (L1 ⊗ L2)(R1 ⊗ R2); the rank is the product of the factors' ranks."""
        from adaptkit.linalg.kron.blocks import kron

        (left1, right1), (left2, right2) = low_rank(self.w1), low_rank(self.w2)
        return kron(left1 * self.scale, left2), kron(right1, right2)

    def computed(self) -> Self:
        return replace(
            self, w1=Dense(self.w1.dense() * self.scale), w2=Dense(self.w2.dense()), scale=1.0
        )

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        (a, b), one = first_shape(shapes)
        (c, columns, _), two = second_shape(shapes)
        return min(one or a, a, b) * min(two or c, c, columns)

    def times(self, factor: float) -> Self:
        """The scale takes the number, the first factor its sign."""
        match self.w1:
            case Product(left, right) if factor < 0:
                w1: Factor = Product(-left, right)
            case _ if factor < 0:
                w1 = Dense(-_stored(self.w1))
            case _:
                w1 = self.w1
        return replace(self, w1=w1, scale=self.scale * abs(factor))

    def kron_factors(self) -> tuple[Tensor, Tensor]:
        one = self.w1.dense()
        return one if self.scale == 1.0 else one * self.scale, self.w2.dense()

    def spectrum(self) -> Tensor:
        """All products of the singular values of the two factors."""
        one, two = (factor_svd(factor).s.double() for factor in (self.w1, self.w2))
        return (
            (abs(self.scale) * one.unsqueeze(-1) * two.unsqueeze(-2))
            .flatten(-2)
            .sort(-1, descending=True)
            .values
        )

    def svd(self, rank: int, method: str = "auto") -> LowRank:
        """σᵢ τⱼ with uᵢ ⊗ u'ⱼ and vᵢ ⊗ v'ⱼ, largest first: optimal (Eckart–Young)."""
        from adaptkit.linalg.kron.blocks import leading_kron

        del method  # always exact, since the factors are small
        return leading_kron(factor_svd(self.w1), factor_svd(self.w2), self.scale, rank)

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """By the rank of the second factor, which is full from `full_from` on.

        A LoKr keeps its factors: the best approximation of that form. Any other kind is first
        fitted by the nearest Kronecker product of factor `spec.factor`; `energies` are those of
        its truncation, which `fit` only improves.
        """
        given = weights if isinstance(weights, Lokr) else None
        lokr = given or cls.fit(weights.delta(), replace(spec, rank=None))
        one, two = lokr.kron_factors()
        sides = ((one.shape[-2], one.shape[-1]), (two.shape[-2], two.shape[-1]))
        both = given is not None and isinstance(given.w1, Product)
        ranks = _SecondRanks((), 0.0, sides, full_from(*sides[1], spec.kernel), spec, both)
        energies = [factor_svd(factor).s.double().square() for factor in (lokr.w1, lokr.w2)]
        kept = ranks.captured(energies[0] * lokr.scale**2, energies[1])[: spec.rank]
        own = float(energies[0].sum() * energies[1].sum()) * lokr.scale**2
        norm = own if given else weights.norm_squared()
        return replace(ranks, energies=tuple(b - a for a, b in pairwise((0.0, *kept))), norm=norm)

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """The nearest Kronecker product (Van Loan and Pitsianis 1993).

        A w2 of low rank is fitted by alternating least squares. LyCORIS and ComfyUI both load the
        result: one factor for both sides, w2 full from half of its larger side on, `w2_b`
        two-dimensional, no Tucker core, alpha = rank. For factors from 32 on see `caution`.
        """
        from adaptkit.linalg.kron.blocks import factorization
        from adaptkit.linalg.kron.lowrank import nearest_kron_lowrank
        from adaptkit.linalg.kron.nearest import nearest_kron

        rows, columns = delta.shape[-2:]
        window = math.prod(spec.kernel)
        a, c = factorization(rows, spec.factor)
        b, d = factorization(columns // window, spec.factor)
        if spec.rank is None or spec.rank >= full_from(c, d * window, spec.kernel):
            best = nearest_kron(delta, a, b)
            return cls(Dense(best.w1), Dense(best.w2), 1.0, spec.kernel)
        low = nearest_kron_lowrank(delta, a, b, spec.rank)
        first: Factor = Dense(low.w1)
        if spec.both and spec.rank < full_from(a, b, ()):  # readers want one rank for both
            first = Product(*factor_svd(first).head(spec.rank).balanced())
        return cls(first, Product(low.left, low.right), 1.0, spec.kernel)

    @classmethod
    def candidates(cls, delta: Tensor, spec: FitSpec, *, ladder: bool) -> list[Weights]:
        """With a ladder: a second factor that may be truncated, and a full one."""
        if not ladder:
            return [cls.fit(delta, spec)]
        full = cls.fit(delta, replace(spec, rank=None))
        return [*full._truncatable(spec.rank), full]

    def _truncatable(self, rank: int | None) -> list[Weights]:
        """w2 as a product of the highest rank that takes less than a full one, if there is one."""
        from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

        dense = self.w2.dense()
        rows, columns = dense.shape[-2:]
        cheaper = (rows * columns - 1) // (rows + columns)
        most = min(full_from(rows, columns, self.kernel or ()) - 1, cheaper)
        most = most if rank is None else min(rank, most)
        if most < 1:
            return []
        return [replace(self, w2=Product(*truncated_svd(dense, SvdSpec(most)).balanced()))]

    def ladder_errors(self, delta: Tensor) -> tuple[float, ...]:
        assert isinstance(self.w2, Product)
        return ladder_errors(delta, self.w1.dense(), self.w2, self.scale)

    def ladder_errors_of_stack(self, delta: Tensor) -> Tensor:
        assert isinstance(self.w2, Product)
        return ladder_errors_of_stack(delta, self.w1.dense(), self.w2, self.scale)

    @classmethod
    def caution(cls, spec: FitSpec) -> str:
        if spec.factor < GUESSED:
            return ""
        return (
            f"LyCORIS guesses the factor from the shapes and fails on some layers from {GUESSED} "
            "on; ComfyUI loads them."
        )

    @classmethod
    def peft_fields(cls, modules: Sequence[Shapes]) -> dict[str, Any]:
        both = {"w1_a" in shapes for shapes in modules}
        # a plan knows a module that becomes a LoKr by the shapes of its source
        known = [m for m in modules if m.keys() <= cls.roles.keys() and m.keys() & {"w1", "w1_a"}]
        sizes = {min(first_shape(m)[0][0], second_shape(m)[0][0]) for m in known}
        if len(both) > 1 or len(sizes) > 1:
            raise NotRepresentable(
                "these LoKr modules differ in how they are factored, "
                "and a PEFT configuration states that once for all",
                hint="--algo lora can hold them",
            )
        fields = {"decompose_both": both == {True}, "decompose_factor": next(iter(sizes), -1)}
        return {**tucker_field(modules), **fields}


@record
class _SecondRanks(Decomposition):
    """Ranks of the second factor, c × d·K, which is full from `limit` on.

    With `both`, the first factor is a product too, and readers want it of the same rank. It stays
    one while it would be a good part of the module; else it is stored full, without loss.
    """

    energies: tuple[float, ...]
    norm: float
    sides: tuple[tuple[int, int], tuple[int, int]]
    limit: int
    spec: FitSpec
    both: bool

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        (a, b), (c, columns) = self.sides
        kernel = self.spec.kernel
        if rank >= self.limit:
            return {"w1": (a, b), "w2": (c, columns // math.prod(kernel), *kernel)}
        first = {"w1_a": (a, rank), "w1_b": (rank, b)} if self._first_too(rank) else {"w1": (a, b)}
        return {**first, "w2_a": (c, rank), "w2_b": (rank, columns)}

    def _first_too(self, rank: int) -> bool:
        (a, b), (c, columns) = self.sides
        return (
            self.both and rank < full_from(a, b, ()) and a * b > SMALL_PART * rank * (c + columns)
        )

    def captured(self, one: Tensor, two: Tensor) -> list[float]:
        """The share of ‖ΔW‖² that ranks 1, 2, … keep: ‖w1‖² ‖w2‖².

        `one` and `two` are the squared singular values of the factors.
        """
        real = int((two > NOTHING * two[:1]).sum())
        ranks = range(1, max(1, min(real, self.limit - 1)) + 1) if self.limit > 1 else ()
        found = [
            float((one[:k] if self._first_too(k) else one).sum() * two[:k].sum()) for k in ranks
        ]
        return [*found, float(one.sum() * two.sum())] if real >= self.limit or not found else found

    def keep(self, weights: Weights, rank: int) -> Weights:
        full = rank >= self.limit
        if not isinstance(weights, Lokr):
            return Lokr.fit(weights.delta(), replace(self.spec, rank=None if full else rank))
        one, two = weights.kron_factors()
        if full:
            return Lokr(Dense(one), Dense(two), 1.0, self.spec.kernel)
        w1: Factor = Dense(one)
        if self._first_too(rank):
            w1 = Product(*factor_svd(weights.w1).head(rank).balanced())
            w1 = replace(w1, left=w1.left * weights.scale)
        return Lokr(
            w1, Product(*factor_svd(weights.w2).head(rank).balanced()), 1.0, self.spec.kernel
        )


def _stored(factor: Factor) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else factor.dense()


ALGORITHM = Lokr
