"""The contract of an algorithm: its tensors, their shapes, and the ΔW that they mean.

`facts`, `decode`, `encode` and `delta` are obligatory; everything else has a default. Code is
written for matrices with leading batch dimensions, `(..., m, n)`. A convolution is its kernel
flattened to (out, in·K), a bias or norm is a column (out, 1).

Commands never ask for an algorithm by name. They ask its class: the class variables of `Weights`
say what an algorithm can do.
"""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._factor import Factor
from adaptkit.algorithms._ladder import FitSpec, Ladder, Truncation
from adaptkit.algorithms._parts import same
from adaptkit.algorithms._settings import Configured
from adaptkit.algorithms._stored import ALPHA, SCRATCH, Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.linalg.lowrank import LowRank
    from adaptkit.linalg.products import Operand

__all__ = [
    "ALPHA",
    "NETWORK",
    "THIN",
    "Decomposition",
    "Facts",
    "FitSpec",
    "KeptStack",
    "Ladder",
    "Role",
    "Shapes",
    "Stated",
    "Weights",
    "same",
]

THIN = 0.5  # of the smaller side: factors of a higher rank cost more than ΔW itself
NETWORK = "lycoris.kohya"  # the `ss_network_module` that loads every algorithm


class Weights(Truncation, Configured):
    """One adapted weight, or a batch of equally shaped ones (leading dimensions)."""

    name: ClassVar[str]
    title: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    forms: ClassVar[tuple[frozenset[str], ...]]  # complete sets of roles, alpha aside
    additive: ClassVar[bool] = True  # ΔW does not depend on the weight that it is added to
    bounded: ClassVar[bool] = False  # alpha bounds a rotation: it is a weight, not a scale

    # what it holds exactly
    dense: ClassVar[bool] = False  # stores ΔW itself: holds any difference, has no rank
    low_rank: ClassVar[bool] = False  # stores left · right: holds any product of two factors
    kron: ClassVar[bool] = False  # `kron_factors` are known
    by_rows: ClassVar[bool] = False  # some rows of what `computed` gives cost their share of ΔW
    applying_wide: ClassVar[int] = 2  # times `applying`: what `applied` takes beside a float64 W
    row_wise: ClassVar[bool] = False  # what is made of some rows of W depends on those rows alone
    cores: ClassVar[frozenset[str]] = frozenset()  # roles that `unrolled` multiplies out

    # wrapping another algorithm, see `over`
    wraps: ClassVar[tuple[str, ...]] = ()
    wrapper: ClassVar[str] = ""  # of a wrapped kind: the algorithm around it
    kind: ClassVar[type[Weights] | None] = None  # of a wrapped kind: the one inside

    # cutting ranks
    resized: ClassVar[str | None] = None  # the algorithm that it becomes; None: has no rank to cut
    stacks: ClassVar[bool] = False  # equally shaped ones with thin factors decompose as one stack

    # fitting to a difference
    extractable: ClassVar[bool] = False
    fit_options: ClassVar[frozenset[str]] = frozenset()  # options of `extract` for this kind alone
    default_rank: ClassVar[int | None] = None  # without a rank rule; None: the fullest form
    refits: ClassVar[bool] = False  # fitting again at the chosen rank beats cutting the ladder
    against_low_rank: ClassVar[bool] = False  # report what a LoRA of as many numbers would keep

    # what readers call it
    network_module: ClassVar[str] = NETWORK  # `ss_network_module` of a file of this kind alone
    peft_type: ClassVar[str] = ""  # `peft_type` of a PEFT configuration; "": PEFT has none
    peft_alpha: ClassVar[str] = "alpha"  # the field of alpha in that configuration
    # dimensions of a kernel for which PEFT has no layer of this kind, or reads this role otherwise
    peft_lacks: ClassVar[Mapping[int, str]] = MappingProxyType({})

    # --- stored tensors ----------------------------------------------------------------------

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        """Rank, size, kernel and scale from stored shapes; ShapeMismatch if they do not fit."""
        raise NotImplementedError

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        """Stored tensors, or equal batches of them, as matrices: not copied, in their dtype."""
        raise NotImplementedError

    def encode(self) -> dict[str, Tensor]:
        """The stored tensors by role; alpha is float32 without dimensions."""
        raise NotImplementedError

    @classmethod
    def stored_as(cls, role: str, *, peft: bool) -> str:
        """The role that PEFT (or LyCORIS, without `peft`) stores instead of this one."""
        return role

    @classmethod
    def laid_out(
        cls, role: str, shape: tuple[int, ...], facts: Facts, *, peft: bool
    ) -> tuple[int, ...]:
        """The stored shape of a role in PEFT's layout, or in that of LyCORIS without `peft`.

        NotRepresentable if that layout cannot hold it.
        """
        return shape

    @classmethod
    def vector_role(cls, *, bias: bool, norm: bool) -> str | None:
        """The role that holds a bias or the vector of a norm; None if the kind holds none."""
        return None

    def placed(self, role: str, *, vector: bool) -> Self:
        """The same weights, stored under this role, as a vector if `vector`."""
        return self

    @classmethod
    def too_wide(cls, shapes: Shapes) -> bool:
        """Whether factors of these shapes store more numbers than ΔW itself."""
        return False

    @classmethod
    def peft_fields(cls, modules: Sequence[Shapes]) -> dict[str, Any]:
        """The fields of a PEFT configuration that only this kind has.

        `modules` are the stored shapes of each module. NotRepresentable if they differ in what the
        configuration states once for all.
        """
        return {}

    # --- ΔW ----------------------------------------------------------------------------------

    def delta(self) -> Tensor:
        """ΔW, (..., rows, columns), in float32 or wider."""
        raise NotImplementedError

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W + strength·ΔW for `base` (..., rows, columns) of float32 or wider.

        May overwrite `base` and return it.
        """
        return base.add_(self.delta(), alpha=strength)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        """Bytes that `applied` takes beside a float32 W of this size."""
        return 4 * min(rows * columns, SCRATCH) if cls.row_wise else 6 * rows * columns

    @property
    def rows(self) -> int:
        """The number of output rows of ΔW."""
        return int(self.delta().shape[-2])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left, right) with left·right = ΔW exactly, (..., rows, r) and (..., r, columns)."""
        raise NotRepresentable(f"{self.name} has no exact low-rank factors")

    def thin_factors(self) -> tuple[Tensor, Tensor] | None:
        """`factors` if their rank is so small that they cost less than ΔW itself."""
        if (pair := self._exact_factors()) is None:
            return None
        left, right = pair
        most = min(left.shape[-2], right.shape[-1]) * THIN
        return (left, right) if left.shape[-1] <= most else None

    def kron_factors(self) -> tuple[Tensor, Tensor] | None:
        """(w1, w2) with w1 ⊗ w2 = ΔW, in float32 or wider; None if it is no such product."""
        return None

    @classmethod
    def product_rank(cls, shapes: Shapes, facts: Facts) -> int:
        """The rank of `factors`, from stored shapes: an upper bound of the rank of ΔW."""
        return facts.rank or min(facts.rows, facts.columns)

    def norm_squared(self) -> float:
        """‖ΔW‖²_F in float64; NotRepresentable if ΔW depends on the weight."""
        from adaptkit.linalg.lowrank import product_norm_squared

        try:
            left, right = self.factors()
        except NotRepresentable:
            return sum(float(block.square().sum()) for block in self._wide_blocks())
        return float(product_norm_squared(left.double(), right.double()).sum())

    def inner_product(self, other: Weights) -> float:
        """⟨ΔW, ΔW'⟩_F; NotRepresentable if one of them depends on the weight."""
        from adaptkit.linalg.products import inner

        return inner(self._operand(), other._operand())

    def distance_squared(self, other: Weights, norm: float | None = None) -> float:
        """‖ΔW − ΔW'‖²_F. `norm` is ‖ΔW‖² if it is known.

        Exact to machine precision of the norms if both have thin factors or equal Kronecker
        blocks.
        """
        from adaptkit.linalg.products import distance_squared

        return distance_squared(self._operand(), other._operand(), norm)

    def _operand(self) -> Operand:
        """ΔW in float64: a float32 product would add its rounding to every distance."""
        from adaptkit.linalg.products import Operand

        kron = self.kron_factors()
        thin = None if kron is not None else self.thin_factors()
        one, two = (pair and (pair[0].double(), pair[1].double()) for pair in (kron, thin))
        return Operand(one, two, self._wide_blocks, self.norm_squared)

    def _wide_blocks(self) -> Iterator[Tensor]:
        from adaptkit.linalg.products import wide_blocks

        return wide_blocks(self.rows, self.kron_factors(), self._exact_factors, self.delta)

    def _exact_factors(self) -> tuple[Tensor, Tensor] | None:
        try:
            return self.factors()
        except NotRepresentable:
            return None

    def spectrum(self) -> Tensor:
        """The singular values of ΔW, (..., r), descending, in float64.

        From thin factors, else the Gram matrix of ΔW. NotRepresentable if ΔW depends on the weight.
        """
        from adaptkit.linalg.factored import factored_core
        from adaptkit.linalg.lowrank import energies

        if (thin := self.thin_factors()) is not None:
            return factored_core(*thin).s
        delta = self.delta()
        return energies(delta, min(delta.shape[-2:])).sqrt()

    def svd(self, rank: int, method: str = "auto") -> LowRank:
        """The leading `rank` singular triplets of ΔW; exact from thin factors."""
        from adaptkit.linalg.factored import factored_svd
        from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

        if (thin := self.thin_factors()) is not None:
            return factored_svd(*thin).head(rank)
        return truncated_svd(self.delta(), SvdSpec(rank, method=method))  # type: ignore[arg-type]

    def widened(self) -> Weights:
        """The same ΔW with factors in float64, so that they are converted only once."""
        return self

    def computed(self) -> Weights:
        """The same ΔW with factors in the compute dtype, so that they are computed only once."""
        return self

    # --- the same ΔW, and ΔW of several ------------------------------------------------------

    def unrolled(self) -> Self:
        """The same ΔW with its `cores` multiplied out: PEFT's layout does not hold them."""
        return self

    def times(self, factor: float) -> Self:
        """The weights of factor · ΔW."""
        raise NotRepresentable(f"a {self.name} cannot be multiplied by {factor:g}")

    def folded(self) -> Self:
        """The same ΔW with scale 1, in float32: the scale is multiplied into one factor."""
        raise NotRepresentable(f"the scale of a {self.name} cannot be folded into its tensors")

    @classmethod
    def exactly(cls, weights: Weights, kernel: tuple[int, ...] | None) -> Self:
        """These weights in this kind, ΔW unchanged; NotRepresentable if there is no exact form.

        `kernel` is the kernel size of the layer, None if it is not known.
        """
        raise NotRepresentable(
            f"a {weights.name} is no {cls.name} exactly",
            hint="--algo lora or --algo full can hold it",
        )

    @classmethod
    def holding(cls, delta: Tensor, kernel: tuple[int, ...]) -> Self:
        """The weights of this very ΔW, not copied; dense kinds only."""
        raise NotRepresentable(f"{cls.name} does not store a difference as it is")

    @classmethod
    def sum(cls, parts: Sequence[Self]) -> Self:
        """The weights of the exact sum of all ΔW (no batch)."""
        raise NotRepresentable(
            f"a sum of {cls.name} is no {cls.name}", hint="--algo lora or --algo full can hold it"
        )

    def part(self, start: int, stop: int) -> Self:
        """The weights of output rows [start, stop), exactly."""
        raise NotRepresentable(f"rows {start} to {stop} of a {self.name} are no {self.name}")

    def own_part(self, start: int, stop: int) -> Self:
        """The part of these rows without what serves other rows alone: a layer at its own rank."""
        return self.part(start, stop)

    def some_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of ΔW, if it is made `by_rows`; each has its bits of any other cut."""
        from adaptkit.linalg.kron.blocks import kron_rows

        if (pair := self.kron_factors()) is not None:
            return kron_rows(*pair, start, stop)
        return self.part(start, stop).delta()

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """The weights whose output rows are those of the parts, in order, exactly.

        Parts that `part` cut from one weight give that weight back, at its own rank.
        """
        raise NotRepresentable(f"{len(parts)} {cls.name} cannot be stacked into one")

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        """Weights of ΔW = 0 with `rows` output rows that `fuse` can stack with `like`."""
        raise NotRepresentable(f"a missing part cannot be filled up in a {cls.name}")

    def swapped(self) -> Self:
        """The weights with the two halves of their output rows exchanged.

        Some layers store their scale and shift in the other order.
        """
        rows = self.rows
        return self.fuse([self.part(rows // 2, rows), self.part(0, rows // 2)])

    @classmethod
    def over(cls, inner: type[Weights]) -> type[Self]:
        """This algorithm around another, as a kind of its own named `<inner>+<this>`."""
        raise NotRepresentable(f"{cls.name} does not wrap other algorithms")

    def member(self, index: int) -> Self:
        """One member of a batch with a single leading dimension."""
        return _pick(self, index)  # type: ignore[return-value]

    # --- ranks of existing weights -----------------------------------------------------------

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """Decompose ΔW of `weights` (any kind, no batch) by the ranks that this kind can keep."""
        raise NotRepresentable(f"a {cls.name} has no rank to choose", hint="--algo lora has")

    @classmethod
    def decompose_stack(cls, weights: Weights, spec: FitSpec) -> list[Decomposition]:
        """`decompose` every member of a stack (one leading dimension); only if `stacks`."""
        raise NotRepresentable(f"{cls.name} are decomposed one by one")

    @classmethod
    def keep_stack(
        cls, weights: Weights, found: Sequence[Decomposition], ranks: Sequence[int]
    ) -> KeptStack:
        """`keep` every member of a stack at its rank."""
        raise NotRepresentable(f"{cls.name} are cut one by one")

    # --- fitting to a difference -------------------------------------------------------------

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """The nearest weights of this kind to `delta` (..., rows, columns), in Frobenius norm.

        Dense kinds share its memory.
        """
        raise NotRepresentable(f"{cls.name} cannot be fitted to a difference")

    @classmethod
    def candidates(cls, delta: Tensor, spec: FitSpec, *, ladder: bool) -> list[Weights]:
        """The weights of this kind to choose from, as `extract` stores them.

        With `ladder`, the first may be truncated to any lower rank afterwards.
        """
        return [cls.fit(delta, spec)]

    @classmethod
    def fit_copies(cls, rank: int | None, factor: int | None) -> int:
        """Float32 copies of ΔW that are alive while it is fitted, the given one included."""
        return 1

    @classmethod
    def fitted_numbers(cls, rows: int, columns: int, rank: int | None) -> int:
        """An upper bound of the numbers that `fit` stores at this rank, alpha aside."""
        return rows * columns

    @classmethod
    def caution(cls, spec: FitSpec) -> str:
        """A sentence about readers of weights fitted so; empty if there is none."""
        return ""


class Decomposition(Ladder):
    """ΔW by rank, without the weights. `energies` are what each rank gains of ‖ΔW‖² = `norm`."""

    energies: tuple[float, ...]
    norm: float

    def elements(self) -> list[int]:
        """How many numbers are stored (alpha aside) at rank 0 (none), 1, …, len(energies)."""
        return [0, *(self.numbers(rank) for rank in range(1, len(self.energies) + 1))]

    def keep(self, weights: Weights, rank: int) -> Weights:
        """The nearest weights of this rank."""
        raise NotImplementedError

    def lighter(self) -> Decomposition:
        """The same without what only saves time."""
        return self


class KeptStack:
    """A stack of weights cut to ranks, padded with zeros up to the highest rank."""

    @property
    def weights(self) -> Weights:
        """The weights that were kept, not rounded yet."""
        raise NotImplementedError

    def distances(self, stored: Weights) -> list[float]:
        """‖ΔW − ΔW'‖²_F in float64, ΔW of the whole weights, ΔW' of `stored`: `weights` rounded."""
        return self.told(stored, self.changes(stored))

    def changes(self, stored: Weights) -> tuple[Tensor, ...]:
        """The small matrices (B, …) that `told` takes, where the weights are."""
        raise NotImplementedError

    def told(self, stored: Weights, changes: Sequence[Tensor]) -> list[float]:
        """`distances` from `changes`, which are on the host."""
        raise NotImplementedError


def _pick(value: object, index: int) -> object:
    if isinstance(value, Factor | Weights):
        names = [field.name for field in fields(value)]  # type: ignore[arg-type]
        return type(value)(*(_pick(getattr(value, name), index) for name in names))
    if isinstance(value, tuple):
        return tuple(_pick(one, index) for one in value)
    return value[index] if hasattr(value, "ndim") else value  # type: ignore[index]
