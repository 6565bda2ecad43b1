"""The contract of an algorithm: what its tensors are called, what their shapes say, and what they mean.

Only `facts`, `decode`, `encode` and `delta` are obligatory. Everything is written for matrices with leading batch
dimensions, `(..., m, n)`: a convolution is its kernel flattened to (out, in·K), a bias or norm a column (out, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.errors import NonFinite, NotRepresentable, ShapeMismatch
from adaptkit.names import WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.linalg.lowrank import LowRank

__all__ = [
    "ALPHA",
    "Decomposition",
    "Dense",
    "Factor",
    "Facts",
    "FitSpec",
    "KeptStack",
    "Product",
    "Role",
    "Shapes",
    "Stated",
    "Tucker",
    "Weights",
    "flat",
    "grouped",
    "same",
    "scaling",
    "stacked",
    "unique",
]

ALPHA = "alpha"
THIN = 0.5  # of the smaller side: factors of a higher rank are dearer than ΔW itself

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Role:
    """What one tensor is to its algorithm: its default spelling (a key suffix) and others found in real files.

    `param` is the parameter it adapts.
    """

    spelling: str
    also: tuple[str, ...] = ()
    param: str = WEIGHT


@dataclass(frozen=True, slots=True)
class Stated:
    """Alpha as a file states it.

    `rank` is the one a PEFT configuration states beside it, which the shapes of some kinds do not tell; `rank_scaled`
    says that alpha is divided by √rank (rsLoRA, arXiv:2312.03732).
    """

    value: float
    rank: int | None = None
    rank_scaled: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What the shapes (and alpha) of one adapted weight say, before any tensor is read.

    `rows` × `columns` is the matrix it adapts, 0 where the stored shapes do not tell; `kernel` its kernel size, `()` for
    a linear layer, None where the stored shapes do not tell. `rank` is None for dense kinds. `scale` multiplies the product.
    """

    rows: int
    columns: int
    kernel: tuple[int, ...] | None
    rank: int | None
    scale: float
    vector: bool = False


@dataclass(frozen=True, slots=True)
class FitSpec:
    """How to fit weights to a difference: `rank` (None: the kind's fullest form), `kernel` of the target.

    Of LoKr: `factor`, and whether `both` factors are products (of one rank).
    """

    rank: int | None = None
    kernel: tuple[int, ...] = ()
    factor: int = 8
    svd: str = "auto"
    seed: int = 0
    both: bool = False


class Weights:
    """One adapted weight, or a batch of equally shaped ones (leading dimensions)."""

    name: ClassVar[str]
    title: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    forms: ClassVar[tuple[frozenset[str], ...]]  # the sets of roles that make a whole, alpha aside
    additive: ClassVar[bool] = True
    wraps: ClassVar[tuple[str, ...]] = ()  # the algorithms this one is put around; see `over`
    bounded: ClassVar[bool] = (
        False  # alpha bounds a rotation and is part of the weights, not a scale
    )
    extractable: ClassVar[bool] = False
    stacks: ClassVar[bool] = (
        False  # whether equally shaped ones, with thin factors, can be taken apart at once
    )
    resized: ClassVar[str | None] = (
        None  # the algorithm it becomes where its rank is cut; None: it has no rank to cut
    )

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        """Rank, size, kernel and scale from stored shapes; ShapeMismatch where they do not fit together."""
        raise NotImplementedError

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        """Stored tensors (with or without equal leading batch dimensions) to matrices; no copy, no change of dtype."""
        raise NotImplementedError

    def encode(self) -> dict[str, Tensor]:
        """The stored tensors by role, alpha included where the kind has one (float32, no dimensions)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW, (..., rows, columns), in float32 or wider."""
        raise NotImplementedError

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W + strength·ΔW for `base` (..., rows, columns) of float32 or wider; may overwrite and return `base`."""
        return base.add_(self.delta(), alpha=strength)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left, right) with left·right = ΔW exactly, (..., rows, r) and (..., r, columns)."""
        raise NotRepresentable(f"{self.name} has no exact low-rank factors")

    def norm_squared(self) -> float:
        """‖ΔW‖²_F in float64; NotRepresentable where ΔW depends on the weight."""
        from adaptkit.linalg.lowrank import product_norm_squared

        try:
            left, right = self.factors()
        except NotRepresentable:
            return float(self.delta().double().square().sum())
        return float(product_norm_squared(left.double(), right.double()).sum())

    def kron_factors(self) -> tuple[Tensor, Tensor] | None:
        """(w1, w2) with w1 ⊗ w2 = ΔW, in float32 or wider; None for all but Kronecker products."""
        return None

    def spectrum(self) -> Tensor:
        """The singular values of ΔW, (..., r), descending, in float64 (float32 on MPS); no vectors.

        From the factors where they are thin, else from the Gram matrix of ΔW. NotRepresentable where ΔW depends on the weight.
        """
        from adaptkit.linalg.factored import factored_core
        from adaptkit.linalg.lowrank import energies

        thin = self.thin_factors()
        if thin is not None:
            return factored_core(*thin).s
        delta = self.delta()
        return energies(delta, min(delta.shape[-2:])).sqrt()

    def svd(self, rank: int, method: str = "auto") -> LowRank:
        """The leading `rank` singular triplets of ΔW; exact from the factors where they are thin."""
        from adaptkit.linalg.factored import factored_svd
        from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

        thin = self.thin_factors()
        if thin is not None:
            return factored_svd(*thin).head(rank)
        return truncated_svd(self.delta(), SvdSpec(rank, method=method))  # type: ignore[arg-type]

    def thin_factors(self) -> tuple[Tensor, Tensor] | None:
        """`factors` where their rank is so small that they are cheaper than ΔW itself; else None."""
        try:
            left, right = self.factors()
        except NotRepresentable:
            return None
        return (
            (left, right) if left.shape[-1] <= min(left.shape[-2], right.shape[-1]) * THIN else None
        )

    def widened(self) -> Weights:
        """The same ΔW in float64, where that saves converting its factors again and again; else itself."""
        return self

    def computed(self) -> Weights:
        """The same ΔW in the compute dtype, where that saves computing its factors again and again; else itself."""
        return self

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        """The rank of `factors`, from stored shapes: at most what ΔW has."""
        return facts.rank or min(facts.rows, facts.columns)

    @classmethod
    def row_step(cls, shapes: Shapes, facts: Facts) -> int | None:
        """How many output rows belong together: `part` may cut between them, and applies to some rows as to all.

        None where the whole weight is needed, or where a part would cost as much as the whole.
        """
        return None

    @classmethod
    def sum(cls, parts: Sequence[Self]) -> Self:
        """The weights of the sum of all ΔW, exactly (no batch)."""
        raise NotRepresentable(
            f"a sum of {cls.name} is no {cls.name}", hint="--algo lora or --algo full can hold it"
        )

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """ΔW of `weights` (no batch), of any kind, taken apart by the ranks that this kind can keep of it."""
        raise NotRepresentable(f"a {cls.name} has no rank to choose", hint="--algo lora has")

    @classmethod
    def decompose_stack(cls, weights: Weights, spec: FitSpec) -> list[Decomposition]:
        """`decompose` of every member of a stack (one leading dimension) at once; only of kinds that are `stacks`."""
        raise NotRepresentable(f"{cls.name} are taken apart one by one")

    @classmethod
    def keep_stack(
        cls, weights: Weights, found: Sequence[Decomposition], ranks: Sequence[int]
    ) -> KeptStack:
        """`keep` of every member of a stack at its rank."""
        raise NotRepresentable(f"{cls.name} are cut one by one")

    def times(self, factor: float) -> Self:
        """The weights of factor · ΔW."""
        raise NotRepresentable(f"a {self.name} cannot be multiplied by {factor:g}")

    def part(self, start: int, stop: int) -> Self:
        """The weights of output rows [start, stop), exactly."""
        raise NotRepresentable(f"rows {start} to {stop} of a {self.name} are no {self.name}")

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """The weights whose output rows are those of the parts, one after the other, exactly.

        Parts that came from a `part` of one thing give that thing back, at its own rank.
        """
        raise NotRepresentable(f"{len(parts)} {cls.name} cannot be stacked into one")

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        """Weights of ΔW = 0 with `rows` output rows that `fuse` can stack with `like`."""
        raise NotRepresentable(f"a missing part cannot be filled up in a {cls.name}")

    def swapped(self) -> Self:
        """The weights with the two halves of their output rows exchanged (a scale and shift in the other order)."""
        rows = self.rows
        return self.fuse([self.part(rows // 2, rows), self.part(0, rows // 2)])

    @property
    def rows(self) -> int:
        """How many output rows ΔW has."""
        return int(self.delta().shape[-2])

    def folded(self) -> Self:
        """The same ΔW with scale 1, in float32: the scale multiplied into one factor, for formats without alpha."""
        raise NotRepresentable(f"the scale of a {self.name} cannot be folded into its tensors")

    @classmethod
    def exactly(cls, weights: Weights, kernel: tuple[int, ...] | None) -> Self:
        """These weights in this kind, ΔW unchanged; NotRepresentable where the kind has no exact form of them.

        `kernel` is the kernel size of the layer, None where nobody knows it.
        """
        raise NotRepresentable(
            f"a {weights.name} is no {cls.name} exactly",
            hint="--algo lora or --algo full can hold it",
        )

    @classmethod
    def stored_as(cls, role: str, *, peft: bool) -> str:
        """The role under which PEFT (or, not `peft`, LyCORIS) stores what this role holds."""
        return role

    @classmethod
    def laid_out(
        cls, role: str, shape: tuple[int, ...], facts: Facts, *, peft: bool
    ) -> tuple[int, ...]:
        """The stored shape of a role as PEFT (or, not `peft`, LyCORIS) lays it out; NotRepresentable where it cannot."""
        return shape

    @classmethod
    def over(cls, inner: type[Weights]) -> type[Self]:
        """This algorithm put around another, as a kind of its own named `<inner>+<this>`."""
        raise NotRepresentable(f"{cls.name} is not put around other algorithms")

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """The nearest weights of this kind to `delta` (..., rows, columns), in Frobenius norm; shares no memory with it."""
        raise NotRepresentable(f"{cls.name} cannot be fitted to a difference")

    def member(self, index: int) -> Self:
        """One member of a batch with a single leading dimension."""
        chosen = {f.name: _pick(getattr(self, f.name), index) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**chosen)


class Decomposition:
    """ΔW by rank: `energies`, what each further rank adds to what is kept of ‖ΔW‖² = `norm`; all of it small.

    The weights themselves are not held: `keep` is given them again.
    """

    energies: tuple[float, ...]
    norm: float

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The stored shape of every role but alpha at this rank, 1 … len(energies)."""
        raise NotImplementedError

    def elements(self) -> list[int]:
        """How many numbers are stored (alpha aside) at rank 0 (none), 1, …, len(energies)."""
        ranks = range(1, len(self.energies) + 1)
        return [
            0,
            *(sum(math.prod(shape) for shape in self.shapes(rank).values()) for rank in ranks),
        ]

    def keep(self, weights: Weights, rank: int) -> Weights:
        """The nearest weights of this rank."""
        raise NotImplementedError

    def lighter(self) -> Decomposition:
        """The same without what only saves time."""
        return self


class KeptStack:
    """A stack of weights cut to ranks, with zeros up to the highest of them; it knows what they were cut from."""

    @property
    def weights(self) -> Weights:
        """What was kept, not rounded yet."""
        raise NotImplementedError

    def distances(self, stored: Weights) -> list[float]:
        """‖ΔW − ΔW'‖²_F of every member in float64, ΔW being whole and ΔW' that of `weights` as they are stored."""
        raise NotImplementedError


def _pick(value: object, index: int) -> object:
    if isinstance(value, Dense | Product | Tucker):
        return type(value)(*(_pick(getattr(value, f.name), index) for f in fields(value)))  # type: ignore[arg-type]
    if isinstance(value, Weights):
        return value.member(index)
    if isinstance(value, tuple):
        return tuple(_pick(one, index) for one in value)
    return value[index] if hasattr(value, "ndim") else value  # type: ignore[index]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same, bit for bit, or both not there."""
    import torch

    if one is None or other is None:
        return one is other
    return one is other or (
        one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    )


def stacked(parts: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Matrices (..., m, r) one below the other, those of each group in columns of its own: block-diagonal by group.

    `groups` numbers the group of each part, from 0 in the order of first appearance; members of one have equal r.
    """
    import torch

    widths = {group: part.shape[-1] for part, group in zip(parts, groups, strict=True)}
    if len(widths) == 1:
        return torch.cat(list(parts), -2)
    rows = []
    for part, group in zip(parts, groups, strict=True):
        before = sum(width for other, width in widths.items() if other < group)
        after = sum(widths.values()) - before - part.shape[-1]
        rows.append(torch.nn.functional.pad(part, (before, after)))
    return torch.cat(rows, -2)


def grouped(parts: Sequence[Tensor]) -> list[int]:
    """The number of each part's group, where equal tensors are one group."""
    firsts: list[Tensor] = []
    numbers: list[int] = []
    for part in parts:
        known = next((n for n, first in enumerate(firsts) if same(first, part)), None)
        if known is None:
            firsts.append(part)
        numbers.append(len(firsts) - 1 if known is None else known)
    return numbers


def unique(parts: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """The first part of each group, in order."""
    return [parts[groups.index(group)] for group in range(max(groups) + 1)]


def flat(tensor: Tensor, ndim: int) -> Tensor:
    """A stored tensor of `ndim` own dimensions as (..., first, rest): `(..., r, i, kh, kw)` → `(..., r, i·kh·kw)`."""
    return tensor.reshape(*tensor.shape[: tensor.ndim - ndim + 1], -1)


def scaling(alpha: Stated | None, rank: int) -> float:
    """alpha / rank, 1 where there is no alpha (kohya, LyCORIS and PEFT agree; rsLoRA divides by √rank)."""
    if alpha is None:
        return 1.0
    if not math.isfinite(alpha.value):
        raise NonFinite(f"alpha is {alpha.value}")
    return alpha.value / (math.sqrt(rank) if alpha.rank_scaled else rank)


def matched(condition: bool, roles: str, shapes: Shapes) -> None:
    """Raise ShapeMismatch with the shapes of these roles unless the condition holds."""
    if not condition:
        listed = ", ".join(
            f"{role} {list(shapes[role])}" for role in roles.split() if role in shapes
        )
        raise ShapeMismatch(f"these shapes do not fit together: {listed}")


class Factor:
    """One side of a Kronecker product: `Dense | Product | Tucker`."""

    def dense(self) -> Tensor:
        """The matrix, (..., m, n), in float32 or wider."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """m."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """A matrix stored as it is, (..., m, n)."""

    matrix: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.matrix)

    @property
    def rows(self) -> int:
        return int(self.matrix.shape[-2])


@dataclass(frozen=True, eq=False)
class Product(Factor):
    """left (..., m, r) · right (..., r, n)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.left) @ upcast(self.right)

    @property
    def rows(self) -> int:
        return int(self.left.shape[-2])


@dataclass(frozen=True, eq=False)
class Tucker(Factor):
    """Σ_{pq} left[:, p] core[p, q, :] right[q, :]: left (..., m, r), core (..., r, s, K), right (..., s, d) → (..., m, d·K)."""

    core: Tensor
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.left) @ spread(upcast(self.core), upcast(self.right))

    @property
    def rows(self) -> int:
        return int(self.left.shape[-2])


def spread(core: Tensor, right: Tensor) -> Tensor:
    """core (..., r, s, K) ×₂ right (..., s, d) → (..., r, d·K), kernel index fastest as in `flatten(1)` of a conv."""
    from adaptkit.linalg.precision import members, one_by_one

    if core.ndim > 3 and one_by_one(right):
        import torch

        pairs = members(core.flatten(-2), right)
        each = [spread(one.reshape(core.shape[-3:]), other) for one, other in pairs]
        return torch.stack(each).reshape(*right.shape[:-2], core.shape[-3], -1)
    wide = core.transpose(-1, -2) @ right.unsqueeze(-3)  # (..., r, K, d)
    return wide.transpose(-1, -2).reshape(*wide.shape[:-2], -1)


def roles(**named: Role) -> Mapping[str, Role]:
    """The roles of an algorithm, read-only."""
    return MappingProxyType(named)
