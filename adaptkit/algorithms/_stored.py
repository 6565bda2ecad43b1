"""What the header of a file states about one adapted weight: roles, shapes, alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NonFinite, ShapeMismatch
from adaptkit.names import WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALPHA",
    "SCRATCH",
    "Facts",
    "Role",
    "Shapes",
    "Stated",
    "flat",
    "matched",
    "roles",
    "scaling",
]

ALPHA = "alpha"
SCRATCH = 1 << 18  # entries of a block of rows, as in linalg.precision

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Role:
    """The part that one tensor plays in its algorithm.

    `spelling` is the key suffix that is written, `also` are others found in files. `param` is
    the parameter that the tensor adapts. `inside` are suffixes that stand for the parameter of
    this name inside the module (`diff_m` for `modulation`), which is a module of its own here.
    `integers` are places or flags, no weights. A `wide` one is written as float32 whatever the
    dtype, as its reader takes no other.
    """

    spelling: str
    also: tuple[str, ...] = ()
    param: str = WEIGHT
    inside: tuple[tuple[str, str], ...] = ()
    integers: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Stated:
    """Alpha as a file states it.

    `rank` is stated by a PEFT configuration only; the shapes of some kinds do not tell it.
    `rank_scaled` means that alpha is divided by √rank (rsLoRA, arXiv:2312.03732).
    """

    value: float
    rank: int | None = None
    rank_scaled: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What shapes and alpha tell about one adapted weight, before a tensor is read.

    `rows` × `columns` is the size of the adapted matrix, 0 if the shapes do not tell it. `kernel`
    is its kernel size: `()` for a linear layer, None if the shapes do not tell it. `rank` is None
    for dense kinds. `scale` multiplies the product. `settings` are what the file says beside its
    tensors, see `Configured`.
    """

    rows: int
    columns: int
    kernel: tuple[int, ...] | None
    rank: int | None
    scale: float
    vector: bool = False
    settings: tuple[Any, ...] = ()  # hashable


def roles(**named: Role) -> Mapping[str, Role]:
    """The roles of an algorithm, read-only."""
    return MappingProxyType(named)


def scaling(alpha: Stated | None, rank: int) -> float:
    """alpha / rank, or 1 without alpha; alpha / √rank for rsLoRA.

    kohya, LyCORIS and PEFT agree on this.
    """
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


def flat(tensor: Tensor, ndim: int) -> Tensor:
    """Flatten the last `ndim` dimensions to two: `(..., r, i, kh, kw)` → `(..., r, i·kh·kw)`."""
    return tensor.reshape(*tensor.shape[: tensor.ndim - ndim + 1], -1)
