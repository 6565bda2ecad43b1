"""Names of weights: targets, slots in them, and skeletons of keys.

These are named tuples because every table is keyed by them: a file has thousands, and each is
hashed a dozen times.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Rows", "Slot", "Target", "tokenise"]

WEIGHT = "weight"
BIAS = "bias"

# indices as they are written: "007", or more digits than an index has, is text. Few enough digits
# that nobody finds many tuples of them with one hash, which would make the tables of names slow
_DIGITS = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
# what stands for a number in a skeleton, and the mark of a text that holds it itself
_NUMBER, _ESCAPE = "#", "\x01"


class Target(NamedTuple):
    """A parameter of the base model, named as in the family's table.

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
    """A range of a target's output rows in shares: rows [start/total, stop/total).

    Shares fit every width, so one table serves all sizes of a model: q of a fused qkv is
    `Rows(0, 1, 3)`.
    """

    start: int
    stop: int
    total: int

    def bounds(self, rows: int) -> tuple[int, int] | None:
        """(first, last + 1) of this range in `rows` rows, or None.

        None if the shares do not divide.
        """
        if rows % self.total:
            return None
        unit = rows // self.total
        return self.start * unit, self.stop * unit


class Slot(NamedTuple):
    """A target or a row range of it: one place to adapt."""

    target: Target
    rows: Rows | None = None

    @property
    def component(self) -> str:
        """The component of the model that holds this slot."""
        return self.target.component

    @property
    def param(self) -> str:
        """The parameter of the module: `weight` or `bias`."""
        return self.target.param

    def __str__(self) -> str:
        cut = "" if self.rows is None else f"[{self.rows.start}:{self.rows.stop}/{self.rows.total}]"
        return f"{self.target}{cut}"


@lru_cache(maxsize=16384)  # of names within the limits: 40 MB at most
def tokenise(key: str) -> tuple[str, tuple[int, ...]]:
    """Split a key into its skeleton (digits replaced by `#`) and its integers.

    >>> tokenise("double_blocks.7.img_attn.qkv")
    ('double_blocks.#.img_attn.qkv', (7,))

    A key may hold `#` itself, which is then escaped: every `#` of a skeleton is one integer.
    """
    if _NUMBER in key or _ESCAPE in key:
        key = key.replace(_ESCAPE, _ESCAPE + "e").replace(_NUMBER, _ESCAPE + "n")
    pieces = _DIGITS.split(key)
    return _NUMBER.join(pieces[::2]), tuple(map(int, pieces[1::2]))
