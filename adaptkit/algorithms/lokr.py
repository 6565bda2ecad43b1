"""LoKr: a Kronecker product of two small matrices, either of them possibly a low-rank product."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms.contract import (
    ALPHA,
    Decomposition,
    Dense,
    Factor,
    Facts,
    FitSpec,
    Product,
    Role,
    Shapes,
    Stated,
    Tucker,
    Weights,
    grouped,
    matched,
    roles,
    same,
    scaling,
    spread,
)
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.linalg.lowrank import LowRank

SMALL_PART = 0.25  # of a module: up to so much a full first factor costs less than the error of cutting its rank
NOTHING = 1e-14  # of the first energy: what lies below is no rank but the rounding of float64
W1_FORMS = (("w1",), ("w1_a", "w1_b"))
W2_FORMS = (("w2",), ("w2_a", "w2_b"), ("t2", "w2_a", "w2_b"))


@dataclass(frozen=True, eq=False)
class Lokr(Weights):
    """ΔW = scale · (W1 ⊗ W2).   W1: (..., a, b)   W2: (..., c, d·K)   out = a·c, in = b·d, K = kernel size

    scale is alpha / rank if a factor is stored as a product, the rank being that factor's; otherwise 1, whatever alpha
    says: files exist with alpha = 1e10 there (source: LyCORIS `modules/lokr.py`, ComfyUI and InvokeAI agree; PEFT alone
    multiplies by alpha / r always, so a PEFT configuration that states r is taken at its word).

    With `t2`, W2[c, d, k] = Σ w2_a[p, c] t2[p, q, k] w2_b[q, d] (`w2_a` is stored transposed). The kernel of a
    convolution flattens as `flatten(1)` does, so kron(W1, W2.flatten(1)) is exact.
    """

    name: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    extractable: ClassVar[bool] = True
    resized: ClassVar[str | None] = "lokr"
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
        (a, b), rank1 = _first(shapes)
        (c, columns, kernel), rank2 = _second(shapes)
        # LyCORIS, ComfyUI and InvokeAI take the rank of w2 where it is a product, else that of w1
        rank = rank2 or rank1
        # only a PEFT configuration gives two full factors a scale: PEFT multiplies by alpha / r whatever the form
        divisor = rank or (alpha.rank if alpha else None)
        scale = scaling(alpha, divisor) if divisor else 1.0
        return Facts(a * c, b * columns, kernel, rank, scale)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        w1: Factor = (
            Dense(tensors["w1"]) if "w1" in tensors else Product(tensors["w1_a"], tensors["w1_b"])
        )
        return cls(w1, _decoded(tensors), facts.scale, facts.kernel)

    def encode(self) -> dict[str, Tensor]:
        import torch

        stored: dict[str, Tensor] = {}
        if isinstance(self.w1, Product):
            stored |= {"w1_a": self.w1.left, "w1_b": self.w1.right}
        elif isinstance(self.w1, Dense):
            # readers give two full factors scale 1, so another scale goes into w1
            folded = self.rank is None and self.scale != 1.0
            stored["w1"] = self.w1.dense() * self.scale if folded else self.w1.matrix
        stored |= self._second_stored()
        # both full: 1 is right for readers that ignore alpha, and with rank 1 for those that do not
        stored[ALPHA] = torch.tensor(
            1.0 if self.rank is None else self.scale * self.rank, dtype=torch.float32
        )
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
        """The rank that alpha is divided by; None where both factors are full."""
        match self.w2:
            case Product(_, right) | Tucker(_, _, right):
                return int(right.shape[-2])
        return int(self.w1.right.shape[-2]) if isinstance(self.w1, Product) else None

    def delta(self) -> Tensor:
        from adaptkit.linalg.kron import kron

        return kron(self.w1.dense() * self.scale, self.w2.dense())

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """Block by block in place: ΔW is never formed."""
        one, two = self.w1.dense() * (self.scale * strength), self.w2.dense()
        (a, b), (c, d) = one.shape[-2:], two.shape[-2:]
        blocks = base.view(*base.shape[:-2], a, c, b, d)
        blocks.addcmul_(
            one[..., :, None, :, None].to(base.dtype), two[..., None, :, None, :].to(base.dtype)
        )
        return base

    def part(self, start: int, stop: int) -> Self:
        """Exact where the cut falls between the blocks of W2: rows of W1."""
        c = self.w2.rows
        if start % c or stop % c:
            raise NotRepresentable(
                f"rows {start} to {stop} cut through a Kronecker block of {c} rows",
                hint="convert it to lora or full first",
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
        """Exact where all parts have the same W2: the rows of their W1, one below the other."""
        import torch

        first = parts[0]
        if not all(_same_factor(part.w2, first.w2) for part in parts):
            raise NotRepresentable(
                "LoKr with different second factors cannot be fused",
                hint="convert with --algo lora or --algo full",
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
        """The scale in the first factor."""
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
        from adaptkit.linalg.kron import kron

        (left1, right1), (left2, right2) = _low_rank(self.w1), _low_rank(self.w2)
        return kron(left1 * self.scale, left2), kron(right1, right2)

    @classmethod
    def row_step(cls, shapes: Shapes, facts: Facts) -> int | None:
        (c, _, _), _ = _second(shapes)
        return None if "t2" in shapes else c

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        (a, b), one = _first(shapes)
        (c, columns, _), two = _second(shapes)
        return min(one or a, a, b) * min(two or c, c, columns)

    def times(self, factor: float) -> Self:
        """The number in the scale, its sign in the first factor."""
        match self.w1:
            case Product(left, right) if factor < 0:
                w1: Factor = Product(-left, right)
            case _ if factor < 0:
                w1 = Dense(-_stored(self.w1))
            case _:
                w1 = self.w1
        return replace(self, w1=w1, scale=self.scale * abs(factor))

    def kron_factors(self) -> tuple[Tensor, Tensor]:
        return self.w1.dense() * self.scale, self.w2.dense()

    def spectrum(self) -> Tensor:
        """All products of the singular values of the two factors."""
        one, two = (_svd(factor).s.double() for factor in (self.w1, self.w2))
        return (
            (abs(self.scale) * one.unsqueeze(-1) * two.unsqueeze(-2))
            .flatten(-2)
            .sort(-1, descending=True)
            .values
        )

    def svd(self, rank: int, method: str = "auto") -> LowRank:
        """σᵢ τⱼ with uᵢ ⊗ u'ⱼ and vᵢ ⊗ v'ⱼ, the largest products first: optimal (Eckart–Young), ΔW never formed."""
        del method  # the factors are small: exact always
        return _leading(_svd(self.w1), _svd(self.w2), self.scale, rank)

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """By the rank of the second factor, full from where readers expect it so.

        Of a LoKr the factors are kept: its best approximation of that form. Anything else is first brought to the nearest
        Kronecker product with factor `spec.factor`; then `energies` are those of its truncation, which `fit` only improves.
        """
        given = weights if isinstance(weights, Lokr) else None
        lokr = given or cls.fit(weights.delta(), replace(spec, rank=None))
        one, two = lokr.kron_factors()
        sides = ((one.shape[-2], one.shape[-1]), (two.shape[-2], two.shape[-1]))
        both = given is not None and isinstance(given.w1, Product)
        ranks = _SecondRanks((), 0.0, sides, full_from(*sides[1], spec.kernel), spec, both)
        energies = [_svd(factor).s.double().square() for factor in (lokr.w1, lokr.w2)]
        kept = ranks.captured(energies[0] * lokr.scale**2, energies[1])[: spec.rank]
        norm = (
            float(energies[0].sum() * energies[1].sum()) * lokr.scale**2
            if given
            else weights.norm_squared()
        )
        return replace(ranks, energies=tuple(b - a for a, b in pairwise((0.0, *kept))), norm=norm)

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """Nearest Kronecker product (Van Loan and Pitsianis 1993), w2 full, or of low rank by alternating least squares.

        Written so that LyCORIS and ComfyUI both load it: one factor for both sides, w2 full once the rank reaches half of
        its larger side, `w2_b` two-dimensional, no Tucker, alpha = rank (reference §3.5); factors from 32 on only ComfyUI
        always reads.
        """
        from adaptkit.linalg.kron import factorization, nearest_kron, nearest_kron_lowrank

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
            first = Product(*_svd(first).head(spec.rank).balanced())
        return cls(first, Product(low.left, low.right), 1.0, spec.kernel)


def full_from(rows: int, columns: int, kernel: tuple[int, ...]) -> int:
    """The rank from which a second factor of rows × columns is stored full: LyCORIS expects it so from half its larger side
    (kernel not counted), and no product is smaller from its smaller side on."""
    larger = max(rows, columns // math.prod(kernel))
    return min(-(-larger // 2), rows, columns)


@dataclass(frozen=True)
class _SecondRanks(Decomposition):
    """Kept ranks are those of the second factor, c × d·K; from `limit` on it is full.

    `both`: the first factor is a product too. It stays one, of the same rank as readers want it, while it would be a good part
    of the module's size; else it is stored full, without loss.
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
        """What is kept of ‖ΔW‖² at ranks 1, 2, … by the squared singular values of the factors: ‖w1‖² ‖w2‖²."""
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
            w1 = Product(*_svd(weights.w1).head(rank).balanced())
            w1 = replace(w1, left=w1.left * weights.scale)
        return Lokr(w1, Product(*_svd(weights.w2).head(rank).balanced()), 1.0, self.spec.kernel)


def _svd(factor: Factor) -> LowRank:
    """All singular triplets of one side, (…, m, n)."""
    from adaptkit.linalg.factored import factored_svd
    from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

    if isinstance(factor, Dense):
        dense = factor.dense()
        return truncated_svd(dense, SvdSpec(min(dense.shape[-2:])))
    found = factored_svd(*_low_rank(factor))
    return found.head(min(found.s.shape[-1], found.u.shape[-2], found.vh.shape[-1]))


def _leading(one: LowRank, two: LowRank, scale: float, rank: int) -> LowRank:
    from adaptkit.linalg.lowrank import LowRank

    products = (one.s.unsqueeze(-1) * two.s.unsqueeze(-2)).flatten(-2)
    s, index = products.topk(min(rank, products.shape[-1]))
    rest = products.double().square().sum(-1) - s.double().square().sum(-1)
    i, j = index // two.s.shape[-1], index % two.s.shape[-1]
    u = _paired(one.u, two.u, i, j)
    v = _paired(one.vh.mT, two.vh.mT, i, j)
    return LowRank(
        u * (-1.0 if scale < 0 else 1.0), abs(scale) * s, v.mT, (scale**2 * rest).clamp_min(0)
    )


def _paired(one: Tensor, two: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Columns i of one (..., a, ·) ⊗ columns j of two (..., c, ·), (..., a·c, k)."""
    left = one.gather(-1, i.unsqueeze(-2).expand(*one.shape[:-1], -1))
    right = two.gather(-1, j.unsqueeze(-2).expand(*two.shape[:-1], -1))
    return (left.unsqueeze(-2) * right.unsqueeze(-3)).flatten(-3, -2)


def _stored(factor: Factor) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else factor.dense()


def _same_factor(one: Factor, other: Factor) -> bool:
    if type(one) is not type(other):
        return False
    return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))  # type: ignore[arg-type]


def _low_rank(factor: Factor) -> tuple[Tensor, Tensor]:
    """(left, right) with left · right = the factor; for a dense one, itself and an identity on its smaller side."""
    import torch

    from adaptkit.linalg.precision import upcast

    if isinstance(factor, Product):
        return upcast(factor.left), upcast(factor.right)
    if isinstance(factor, Tucker):
        return upcast(factor.left), spread(upcast(factor.core), upcast(factor.right))
    dense = factor.dense()
    rows, columns = dense.shape[-2:]
    eye = torch.eye(min(rows, columns), dtype=dense.dtype, device=dense.device).expand(
        *dense.shape[:-2], -1, -1
    )
    return (eye, dense) if rows <= columns else (dense, eye)


def _first(shapes: Shapes) -> tuple[tuple[int, int], int | None]:
    """(a, b) and the rank of w1."""
    if "w1" in shapes:
        w1 = shapes["w1"]
        matched(len(w1) == 2, "w1", shapes)
        return (w1[0], w1[1]), None
    left, right = shapes["w1_a"], shapes["w1_b"]
    matched(len(left) == len(right) == 2 and left[1] == right[0] > 0, "w1_a w1_b", shapes)
    return (left[0], right[1]), right[0]


def _second(shapes: Shapes) -> tuple[tuple[int, int, tuple[int, ...] | None], int | None]:
    """(c, d·K, kernel) and the rank of w2; the kernel of a flattened `w2_b` is not stored."""
    if "w2" in shapes:
        w2 = shapes["w2"]
        matched(len(w2) >= 2, "w2", shapes)
        return (w2[0], math.prod(w2[1:]), w2[2:]), None
    left, right = shapes["w2_a"], shapes["w2_b"]
    matched(len(left) >= 2 and len(right) >= 2, "w2_a w2_b", shapes)
    if "t2" in shapes:
        core = shapes["t2"]
        matched(
            len(core) > 2 and core[0] == left[0] and core[1] == right[0] > 0, "t2 w2_a w2_b", shapes
        )
        return (left[1], math.prod(right[1:]) * math.prod(core[2:]), core[2:]), right[0]
    matched(left[1] == right[0] > 0, "w2_a w2_b", shapes)
    kernel = right[2:] or None
    return (left[0], math.prod(right[1:]), kernel), right[0]


def _decoded(tensors: Mapping[str, Tensor]) -> Factor:
    batch = _batch(tensors)
    if "w2" in tensors:
        w2 = tensors["w2"]
        return Dense(w2.reshape(*w2.shape[: batch + 1], -1))
    left, right = tensors["w2_a"], tensors["w2_b"]
    right = right.reshape(*right.shape[: batch + 1], -1)
    left = left.reshape(*left.shape[: batch + 2])
    if "t2" in tensors:
        core = tensors["t2"]
        return Tucker(core.reshape(*core.shape[: batch + 2], -1), left.transpose(-1, -2), right)
    return Product(left, right)


def _batch(tensors: Mapping[str, Tensor]) -> int:
    """How many leading batch dimensions: w1's own are two (it is never stored with more)."""
    return tensors["w1" if "w1" in tensors else "w1_a"].ndim - 2


ALGORITHM = Lokr
