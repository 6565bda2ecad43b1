"""The stored forms of a LoKr: shapes and tensors of its two factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptkit.algorithms._factor import Dense, Factor, Product, Tucker
from adaptkit.algorithms._stored import Shapes, matched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["PIECEWISE", "Working", "first_shape", "full_from", "second_factor", "second_shape"]

# up to this factor, blocks are few enough (`linalg.kron.blocks.GRAM_SIDE`) to be looked at in
# pieces; for larger ones a difference is rearranged as a whole
PIECEWISE = 16


def first_shape(shapes: Shapes) -> tuple[tuple[int, int], int | None]:
    """(a, b) and the rank of w1; None for a full one."""
    if "w1" in shapes:
        w1 = shapes["w1"]
        matched(len(w1) == 2, "w1", shapes)
        return (w1[0], w1[1]), None
    left, right = shapes["w1_a"], shapes["w1_b"]
    matched(len(left) == len(right) == 2 and left[1] == right[0] > 0, "w1_a w1_b", shapes)
    return (left[0], right[1]), right[0]


def second_shape(shapes: Shapes) -> tuple[tuple[int, int, tuple[int, ...] | None], int | None]:
    """(c, d·K, kernel) and the rank of w2; a flattened `w2_b` does not tell its kernel."""
    if "w2" in shapes:
        w2 = shapes["w2"]
        matched(len(w2) >= 2, "w2", shapes)
        return (w2[0], math.prod(w2[1:]), w2[2:]), None
    left, right = shapes["w2_a"], shapes["w2_b"]
    ones = math.prod(left[2:]) == 1
    matched(len(left) >= 2 and len(right) >= 2 and ones, "w2_a w2_b", shapes)
    if "t2" in shapes:
        core = shapes["t2"]
        matched(
            len(core) > 2 and core[0] == left[0] and core[1] == right[0] > 0, "t2 w2_a w2_b", shapes
        )
        return (left[1], math.prod(right[1:]) * math.prod(core[2:]), core[2:]), right[0]
    matched(left[1] == right[0] > 0, "w2_a w2_b", shapes)
    kernel = right[2:] or None
    return (left[0], math.prod(right[1:]), kernel), right[0]


def second_factor(tensors: Mapping[str, Tensor]) -> Factor:
    """w2 from the stored tensors, its kernel flattened."""
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
    """The number of batch dimensions: w1 has two of its own, in every file."""
    return tensors["w1" if "w1" in tensors else "w1_a"].ndim - 2


def full_from(rows: int, columns: int, kernel: tuple[int, ...]) -> int:
    """The rank from which a second factor of rows × columns is stored full.

    LyCORIS expects that from half its larger side on, the kernel not counted. From its smaller
    side on, no product is smaller.
    """
    larger = max(rows, columns // math.prod(kernel))
    return min(-(-larger // 2), rows, columns)


class Working:
    """The memory that LoKr take, for plans."""

    @classmethod
    def fit_copies(cls, rank: int | None, factor: int | None) -> int:
        """A second copy of ΔW for a w2 of low rank, and where blocks are many."""
        return 1 if rank is None and factor and 0 < factor <= PIECEWISE else 2

    @classmethod
    def cutting_bytes(cls, shapes: Shapes) -> int:
        """The SVD of a full w2 at all ranks; a factored one made full, in float64, to be measured.

        Measured on shapes from 320 × 160 to 2688 × 384 and 2048 × 2048.
        """
        (rows, columns, _), rank = second_shape(shapes)
        if rank is not None:
            return 24 * rows * columns
        return 8 * rows * columns + 70 * min(rows, columns) ** 2

    @classmethod
    def whole_numbers(cls, shapes: Shapes) -> int:
        (rows, columns, _), _ = second_shape(shapes)
        return math.prod(first_shape(shapes)[0]) + rows * columns
