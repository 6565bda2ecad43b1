"""What is known of a tensor that is stored in another arrangement than it is read in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["Arranged"]


class Arranged(NamedTuple):
    """A tensor under the name that it is read by: its dtype, its shape, and how it is made.

    `parts` are the keys of the stored tensors that it is made of. `read` takes these by part, as
    stored, and gives the tensor without a change of any number.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    read: Callable[[Mapping[str, Tensor]], Tensor]
