"""How weights are fitted to a difference, and how fitted weights are truncated to a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.algorithms._stored import Shapes

__all__ = ["FitSpec", "Ladder", "Truncation"]


@dataclass(frozen=True, slots=True)
class FitSpec:
    """How to fit weights to a difference. Each kind reads the fields that it has a use for.

    `rank` None means the fullest form of the kind. `kernel` is that of the layer. `factor` is the
    size of the small factor, `both` stores both factors as products. `alpha` is stored instead of
    the rank. `quantile` clamps factors to this quantile of their magnitudes.
    """

    rank: int | None = None
    kernel: tuple[int, ...] = ()
    factor: int = 8
    svd: str = "auto"
    seed: int = 0
    both: bool = False
    alpha: float | None = None
    quantile: float | None = None


class Ladder:
    """What one layer may be stored as, by rank: its shapes and its numbers."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The stored shape of every role but alpha at this rank."""
        raise NotImplementedError

    def numbers(self, rank: int) -> int:
        """How many numbers are stored at this rank, alpha aside."""
        return sum(math.prod(shape) for shape in self.shapes(rank).values())


class Truncation:
    """Stored tensors that keep their leading ranks, if the kind names `ladder_roles`."""

    # the roles that share the rank that a ladder truncates: last axis of one, first of the other
    ladder_roles: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def cutting_bytes(cls, shapes: Shapes) -> int:
        """Bytes that cutting the rank of stored tensors takes, beside 16 for each number."""
        return 0

    @classmethod
    def whole_numbers(cls, shapes: Shapes) -> int:
        """The numbers of the factors of a Kronecker product, made full to be measured."""
        return 0

    @classmethod
    def laddered(cls, shapes: Shapes) -> bool:
        """Whether weights of these stored shapes may be truncated to any lower rank."""
        return cls.ladder_roles is not None and set(cls.ladder_roles) <= shapes.keys()

    @classmethod
    def truncated_shapes(cls, shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
        """The stored shapes at a lower rank."""
        left, right = cls.ladder_roles or ("", "")
        found = dict(shapes)
        found[left] = (found[left][0], rank, *found[left][2:])
        found[right] = (rank, *found[right][1:])
        return found

    @classmethod
    def truncated(cls, role: str, stored: Tensor, rank: int) -> Tensor:
        """A stored tensor at a lower rank."""
        left, right = cls.ladder_roles or ("", "")
        if role not in (left, right):
            return stored
        return (stored[:, :rank] if role == left else stored[:rank]).contiguous()

    @classmethod
    def ladder_sides(cls, shapes: Shapes) -> tuple[int, int]:
        """(rows, columns) of the matrix whose singular values the ladder keeps."""
        left, right = (shapes[role] for role in cls.ladder_roles or ())
        return left[0], math.prod(right[1:])

    def ladder_errors(self, delta: Tensor) -> tuple[float, ...]:
        """‖delta − ΔW‖² truncated to ranks 0, 1, …; leaves `delta` as it is."""
        raise NotRepresentable(f"a {type(self).__name__} has no ladder of ranks")

    def ladder_errors_of_stack(self, delta: Tensor) -> Tensor:
        """`ladder_errors` of each member of a stack (one leading dimension), (B, ranks + 1).

        On the device of `delta`, which is not waited for, and may be overwritten.
        """
        raise NotRepresentable(f"a {type(self).__name__} has no ladder of ranks")
