"""What a weight is called: targets of the base model, slots in them, and skeletons of key strings.

They are named tuples because they are the keys of every table: a file has thousands, each hashed a dozen times.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Rows", "Slot", "Target", "tokenise"]

WEIGHT = "weight"
BIAS = "bias"

_DIGITS = re.compile(r"(\d+)")


class Target(NamedTuple):
    """A parameter of the base model, under the name the family's table gives it.

    `component` is the part of the model (`unet`, `text_encoder`), `module` the dotted module name,
    `param` the parameter of that module (`weight`, `bias`).
    """

    component: str
    module: str
    param: str = WEIGHT

    def __str__(self) -> str:
        name = f"{self.component}.{self.module}" if self.component else self.module
        return name if self.param == WEIGHT else f"{name}.{self.param}"


class Rows(NamedTuple):
    """A cut of a target's output rows, in shares: rows [start/total, stop/total) of them.

    Shares instead of sizes, so that one table holds for every width: q of a fused qkv is `Rows(0, 1, 3)`.
    """

    start: int
    stop: int
    total: int

    def bounds(self, rows: int) -> tuple[int, int] | None:
        """First and last-plus-one row of this cut in a target of `rows` rows; None where the shares do not divide."""
        if rows % self.total:
            return None
        unit = rows // self.total
        return self.start * unit, self.stop * unit


class Slot(NamedTuple):
    """A target, or a row-part of it: the place where one adapted weight applies."""

    target: Target
    rows: Rows | None = None

    @property
    def component(self) -> str:
        """The part of the model this slot lies in."""
        return self.target.component

    @property
    def param(self) -> str:
        """The parameter of the module: `weight` or `bias`."""
        return self.target.param

    def __str__(self) -> str:
        cut = "" if self.rows is None else f"[{self.rows.start}:{self.rows.stop}/{self.rows.total}]"
        return f"{self.target}{cut}"


@lru_cache(maxsize=65536)
def tokenise(key: str) -> tuple[str, tuple[int, ...]]:
    """Split a key into its skeleton, each run of digits replaced by `#`, and those integers in order.

    >>> tokenise("double_blocks.7.img_attn.qkv")
    ('double_blocks.#.img_attn.qkv', (7,))
    """
    pieces = _DIGITS.split(key)
    return "#".join(pieces[::2]), tuple(map(int, pieces[1::2]))
