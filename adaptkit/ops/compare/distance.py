"""Norms, inner product and distance of two differences, in float64.

Small factors are used directly, without forming ΔW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NotRepresentable
from adaptkit.keymap.kinds import changed

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

# entries of ΔW that are formed at a time: 1 MB in float64, up to four blocks at once
BLOCK = 1 << 17


@dataclass(frozen=True, slots=True)
class Numbers:
    """‖A‖², ‖B‖², ⟨A, B⟩ and ‖A − B‖².

    `known` is False if A and B are equal, but their norm depends on a weight that was not given.
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
        """Return whether there was no NaN, infinity or overflow."""
        return all(map(math.isfinite, (self.a, self.b, self.inner, self.error)))

    @property
    def norm_a(self) -> float | None:
        """Return ‖A‖."""
        return math.sqrt(self.a) if self.known else None

    @property
    def norm_b(self) -> float | None:
        """Return ‖B‖."""
        return math.sqrt(self.b) if self.known else None

    @property
    def cosine(self) -> float | None:
        """Return ⟨A, B⟩ / (‖A‖ ‖B‖), or None if either norm is 0."""
        if not self.known or self.a == 0.0 or self.b == 0.0:
            return None
        if self.error == 0.0:
            return 1.0
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.a) / math.sqrt(self.b)))

    @property
    def over_a(self) -> float | None:
        """Return ‖A − B‖ / ‖A‖, as `over_b` does."""
        return self._relative(self.a)

    @property
    def over_b(self) -> float | None:
        """Return ‖A − B‖ / ‖B‖, or None if undefined or unknown; 0 if A equals B."""
        return self._relative(self.b)

    def _relative(self, size: float) -> float | None:
        if self.error == 0.0:
            return 0.0
        return _quotient(math.sqrt(self.error), math.sqrt(size)) if self.known else None

    @property
    def fitted(self) -> float | None:
        """Return ⟨A, B⟩ / ‖A‖², the factor of A nearest to B; None if A is 0."""
        return _quotient(self.inner, self.a) if self.known else None


def _quotient(one: float, other: float) -> float | None:
    """Return one / other, or None if it is not finite."""
    found = one / other if other > 0.0 else math.inf
    return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Difference:
    """A difference (rows × columns) in its cheapest form, float64.

    `block(start, stop)` forms rows. `factors()` returns left (rows, r) and right (r, columns) if
    r is small. `kron` is (w1, w2) if the difference is w1 ⊗ w2.
    """

    rows: int
    columns: int
    block: Callable[[int, int], Tensor]
    factors: Callable[[], Factors] | None = None
    kron: Factors | None = None

    def cut(self, start: int, stop: int) -> Difference:
        """Return rows [start, stop)."""
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
        """Return the difference with the two halves of its rows exchanged."""
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


# constructors


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert stored tensors to float64, except for flags."""
    return {
        role: _wide(tensor) if tensor.is_floating_point() else tensor
        for role, tensor in tensors.items()
    }


def _wide(tensor: Tensor) -> Tensor:

    return tensor.double()


def form(weights: Weights, strength: float, size: tuple[int, int], *, thin: bool) -> Difference:
    """Return strength · ΔW of additive weights without a batch dimension.

    `size` is (rows, columns). `thin` weights are used through their factors.
    """

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
    """Form rows of one (a, b) ⊗ two (c, d).

    Row i·c + p is one[i] ⊗ two[p].
    """
    import torch

    row = torch.arange(start, stop, device=one.device)
    height = two.shape[0]
    return (one[row // height].unsqueeze(-1) * two[row % height].unsqueeze(-2)).flatten(-2)


def applied(weights: Weights, base: Tensor, strength: float) -> Difference:
    """Return ΔW of weights of any algorithm on a base (rows, columns), dense unless row by row."""
    if weights.row_wise:
        made = weights.computed()
        rows, columns = base.shape
        return Difference(
            rows,
            columns,
            lambda start, stop: changed(made.part(start, stop), base[start:stop], strength),
        )
    change = changed(weights, base, strength)
    return Difference(change.shape[0], change.shape[1], lambda start, stop: change[start:stop])


def difference(tuned: Tensor, base: Tensor) -> Difference:
    """Return tuned − base, both (rows, columns) in any dtype, widened before subtracting."""
    rows, columns = base.shape
    return Difference(
        rows, columns, lambda start, stop: _wide(tuned[start:stop]) - _wide(base[start:stop])
    )


def alike(one: Any, other: Any) -> bool:
    """Return whether two weights have the same algorithm and numbers, in any file layout."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(alike(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if hasattr(one, "ndim"):
        return bool(one.shape == other.shape) and _equal(one, other)
    if isinstance(one, tuple):
        held = [[value for value in many if hasattr(value, "ndim")] for many in (one, other)]
        return len(held[0]) == len(held[1]) and all(map(alike, *held))
    return type(one) is int or bool(one == other)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, in whatever dtype."""
    import torch

    if one.dtype == other.dtype:
        return torch.equal(one, other)
    flat = one.reshape(-1), other.reshape(-1)
    pieces = (slice(start, start + BLOCK) for start in range(0, one.numel(), BLOCK))
    return all(torch.equal(*(_wide(each[piece]) for each in flat)) for piece in pieces)


# measuring


def measure(a: Difference | None, b: Difference | None) -> Numbers:
    """Measure two differences of one size; None is zero."""
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
    """Return ‖·‖²."""
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
    """Measure block by block; each block of both is formed once."""
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
