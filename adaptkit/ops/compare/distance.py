"""Two differences side by side: norms, inner product and distance, in float64, and without ΔW where factors are small."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights

__all__ = [
    "BLOCK",
    "Difference",
    "Numbers",
    "alike",
    "applied",
    "difference",
    "form",
    "measure",
    "widened",
]

Factors = tuple["Tensor", "Tensor"]

BLOCK = (
    1 << 19
)  # entries of ΔW that are formed at a time: 4 MB in float64, and four of them are alive


@dataclass(frozen=True, slots=True)
class Numbers:
    """‖A‖², ‖B‖², ⟨A, B⟩ and ‖A − B‖².

    Not `known`: both are equal, and how large they are depends on the weight that they change.
    """

    a: float = 0.0
    b: float = 0.0
    inner: float = 0.0
    error: float = 0.0
    known: bool = True

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(
            self.a + other.a,
            self.b + other.b,
            self.inner + other.inner,
            self.error + other.error,
            self.known and other.known,
        )

    @property
    def finite(self) -> bool:
        """Whether no tensor held NaN or infinity, and nothing overflowed."""
        return all(map(math.isfinite, (self.a, self.b, self.inner, self.error)))

    @property
    def norm_a(self) -> float | None:
        """‖A‖."""
        return math.sqrt(self.a) if self.known else None

    @property
    def norm_b(self) -> float | None:
        """‖B‖."""
        return math.sqrt(self.b) if self.known else None

    @property
    def cosine(self) -> float | None:
        """⟨A, B⟩ / (‖A‖ ‖B‖); None where either is 0."""
        if not self.known or self.a == 0.0 or self.b == 0.0:
            return None
        if self.error == 0.0:
            return 1.0
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.a) / math.sqrt(self.b)))

    @property
    def over_a(self) -> float | None:
        """‖A − B‖ / ‖A‖."""
        return self._relative(self.a)

    @property
    def over_b(self) -> float | None:
        """‖A − B‖ / ‖B‖; 0 where they are equal, None where ‖B‖ alone is 0 or a norm is not known."""
        return self._relative(self.b)

    def _relative(self, size: float) -> float | None:
        if self.error == 0.0:
            return 0.0
        return _quotient(math.sqrt(self.error), math.sqrt(size)) if self.known else None

    @property
    def fitted(self) -> float | None:
        """The factor that brings A nearest to B, ⟨A, B⟩ / ‖A‖²; None where A is 0."""
        return _quotient(self.inner, self.a) if self.known else None


def _quotient(one: float, other: float) -> float | None:
    """one / other, where that is a number."""
    found = one / other if other > 0.0 else math.inf
    return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Difference:
    """One difference (rows × columns), as cheaply as it is to be had; all tensors in float64 (float32 on MPS).

    `block(start, stop)` forms these rows of it. `factors()` gives (left (rows, r), right (r, columns)) where r is small,
    `kron` is (w1, w2) with w1 ⊗ w2 the difference.
    """

    rows: int
    columns: int
    block: Callable[[int, int], Tensor]
    factors: Callable[[], Factors] | None = None
    kron: Factors | None = None

    def cut(self, start: int, stop: int) -> Difference:
        """Rows [start, stop) of it."""
        if (start, stop) == (0, self.rows):
            return self
        whole, kron = self.factors, self.kron
        height = 1 if kron is None else kron[1].shape[-2]
        aligned = kron is not None and start % height == 0 and stop % height == 0
        return Difference(
            stop - start,
            self.columns,
            lambda first, last: self.block(start + first, start + last),
            None if whole is None else lambda: _rows(whole(), start, stop),
            _rows(kron, start // height, stop // height) if kron is not None and aligned else None,
        )

    def exchanged(self) -> Difference:
        """The same with the two halves of its rows exchanged."""
        whole, half = self.factors, self.rows // 2

        def block(start: int, stop: int) -> Tensor:
            import torch

            parts = [(start + half, min(stop, half) + half), (max(start, half) - half, stop - half)]
            return torch.cat([self.block(first, last) for first, last in parts if last > first])

        return Difference(
            self.rows,
            self.columns,
            block,
            None if whole is None else lambda: (whole()[0].roll(half, 0), whole()[1]),
        )


def _rows(factors: Factors, start: int, stop: int) -> Factors:
    return factors[0][start:stop], factors[1]


# making forms ----------------------------------------------------------------------------------------------------


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in float64 (float32 on MPS); flags as they are."""
    return {
        role: _wide(tensor) if tensor.is_floating_point() else tensor
        for role, tensor in tensors.items()
    }


def _wide(tensor: Tensor) -> Tensor:
    from adaptkit.linalg.precision import accumulate_dtype

    return tensor.to(accumulate_dtype(tensor.device))


def form(weights: Weights, strength: float, size: tuple[int, int], *, thin: bool) -> Difference:
    """strength · ΔW of additive weights (no batch) of `size` (rows, columns); `thin`: through their factors."""

    def factors() -> Factors:
        left, right = weights.factors()
        return _wide(left) * strength, _wide(right)

    kron = weights.kron_factors()
    if kron is not None:
        one, two = _wide(kron[0]) * strength, _wide(kron[1])
        return Difference(
            *size,
            lambda start, stop: _kron_rows(one, two, start, stop),
            factors if thin else None,
            (one, two),
        )
    return Difference(
        *size,
        lambda start, stop: _wide(_block(weights, start, stop)) * strength,
        factors if thin else None,
    )


def _block(weights: Weights, start: int, stop: int) -> Tensor:
    """Rows of ΔW; of a kind that cannot be cut, all of it is formed."""
    try:
        return weights.part(start, stop).delta()
    except NotRepresentable:
        return weights.delta()[start:stop]


def _kron_rows(one: Tensor, two: Tensor, start: int, stop: int) -> Tensor:
    """Rows of one (a, b) ⊗ two (c, d): row i·c + p is one[i] ⊗ two[p]."""
    import torch

    row = torch.arange(start, stop, device=one.device)
    height = two.shape[0]
    return (one[row // height].unsqueeze(-1) * two[row % height].unsqueeze(-2)).flatten(-2)


def applied(weights: Weights, base: Tensor, strength: float) -> Difference:
    """What weights of any kind change of their base (rows, columns): dense."""
    wide = _wide(base)
    change = weights.apply(wide.clone(), strength).sub_(wide)
    return Difference(change.shape[0], change.shape[1], lambda start, stop: change[start:stop])


def difference(tuned: Tensor, base: Tensor) -> Difference:
    """tuned − base, both (rows, columns) in any dtype, widened before they are subtracted."""
    rows, columns = base.shape
    return Difference(
        rows, columns, lambda start, stop: _wide(tuned[start:stop]) - _wide(base[start:stop])
    )


def alike(one: Any, other: Any) -> bool:
    """Whether two weights are of one kind and hold the same numbers; how a file lays them out (sizes) does not count."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(alike(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if hasattr(one, "ndim"):
        return bool(one.shape == other.shape and (_wide(one) == _wide(other)).all())
    if isinstance(one, tuple):
        held = [[value for value in many if hasattr(value, "ndim")] for many in (one, other)]
        return len(held[0]) == len(held[1]) and all(map(alike, *held))
    return type(one) is int or bool(one == other)


# measuring -------------------------------------------------------------------------------------------------------


def measure(a: Difference | None, b: Difference | None) -> Numbers:
    """The numbers of two differences of one size; None stands for no difference."""
    if a is None or b is None:
        size = 0.0 if (only := a or b) is None else _size(only)
        return Numbers(size if a else 0.0, size if b else 0.0, 0.0, size)
    from adaptkit.linalg.products import compare_products, rearranged

    if a.kron is not None and b.kron is not None and a.kron[0].shape == b.kron[0].shape:
        return Numbers(*compare_products(rearranged(a.kron), rearranged(b.kron)))
    if (found := _kron_and_product(a, b)) is not None:
        return found
    if a.factors is not None and b.factors is not None:
        return Numbers(*compare_products(a.factors(), b.factors()))
    return _dense(a, b)


def _size(form: Difference) -> float:
    """‖·‖²."""
    from adaptkit.linalg.products import kron_norm, product_norm

    if form.kron is not None:
        return kron_norm(form.kron)
    if form.factors is not None:
        return product_norm(form.factors())
    return sum(_dot(block, block) for (block,) in _blocks(form))


def _kron_and_product(a: Difference, b: Difference) -> Numbers | None:
    """Compare a Kronecker product and a product; None for other forms, or if nearly equal."""
    from adaptkit.linalg.products import compare_kron

    if a.kron is not None and b.factors is not None:
        found = compare_kron(a.kron, b.factors())
        return found and Numbers(*found)
    if b.kron is None or a.factors is None:
        return None
    found = compare_kron(b.kron, a.factors())
    return found and Numbers(found.two, found.one, found.inner, found.distance)


def _dense(a: Difference, b: Difference) -> Numbers:
    """Row by row, each block of both formed once."""
    total = Numbers()
    for one, other in _blocks(a, b):
        apart = one - other
        total += Numbers(_dot(one, one), _dot(other, other), _dot(one, other), _dot(apart, apart))
    return total


def _blocks(*forms: Difference) -> Iterator[tuple[Tensor, ...]]:
    first = forms[0]
    step = max(1, BLOCK // max(1, first.columns))
    for start in range(0, first.rows, step):
        yield tuple(form.block(start, min(start + step, first.rows)) for form in forms)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.reshape(-1).dot(other.reshape(-1)))
