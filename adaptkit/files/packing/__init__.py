"""A packed weight: what a header tells of it, its numbers, and how they are packed again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "Packed", "Packing", "Was", "divided", "joined", "largest", "nearest", "places", "slices",
    "unread", "widths",
]  # fmt: skip

# numbers that are unpacked or packed at a time: what comes in between stays in the cache
CHUNK = 1 << 18


class Was(NamedTuple):
    """What packing asks of the numbers before.

    Which of them stay the same, in the order of `shape`, and the largest magnitude of all.
    """

    same: Tensor
    largest: float


class Packing(NamedTuple):
    """How numbers are packed again.

    `parts` are those that are written anew. `encode` takes the new numbers, float32 in the order
    of `shape`, what is asked of the old ones, and the stored tensors, and gives the new ones of
    `parts`. Blocks whose numbers stay the same keep their bytes. `allowed` takes stored tensors
    and the numbers that they stand for, and gives the largest error that rounding to them may
    leave, for each number or to be broadcast to their shape. With `turn`, that is the error of
    `turn(numbers)`.
    """

    parts: tuple[str, ...]
    encode: Callable[[Tensor, Was, Mapping[str, Tensor]], dict[str, Tensor]]
    allowed: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    turn: Callable[[Tensor], Tensor] | None = None


class Packed(NamedTuple):
    """A packed weight: the name and shape that it is shown with, its tensors, and its numbers.

    `parts` are the keys of all its tensors by part, `weight` among them. `numbers` takes them as
    stored and gives float32 numbers in the order of `shape`, in flat pieces if `by_pieces`, else
    whole. `packing` is None if they cannot be written again. Unless `plain`, the weights of the
    file are no model by themselves, so it cannot be written as plain numbers either.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    numbers: Callable[[Mapping[str, Tensor]], Iterator[Tensor]]
    packing: Packing | None = None
    plain: bool = True
    by_pieces: bool = True

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The numbers (*shape), float32, of tensors as stored."""
        pieces = self.numbers(stored)
        found = joined(pieces, math.prod(self.shape)) if self.by_pieces else next(pieces)
        return found.reshape(self.shape)

    def rewritten(self) -> tuple[str, ...]:
        """The keys of the tensors that are written anew."""
        return () if self.packing is None else tuple(self.parts[p] for p in self.packing.parts)

    @property
    def unpacking_bytes(self) -> int:
        """Bytes that `decode` takes beside what is stored and the numbers."""
        wide = 4 * math.prod(self.shape)
        return min(2 * wide, 16 * CHUNK) if self.by_pieces else 2 * wide  # places and scales


def unread(
    dtype: str, shape: tuple[int, ...], parts: Mapping[str, str], *, plain: bool = True
) -> Packed:
    """A weight that is only told by the name of its format."""

    def numbers(_: Mapping[str, Tensor]) -> Iterator[Tensor]:
        raise NotRepresentable(f"stored as {dtype}, which is not read", tensor=parts["weight"])

    return Packed(dtype, shape, parts, numbers, plain=plain, by_pieces=False)


def joined(pieces: Iterator[Tensor], count: int) -> Tensor:
    """`count` numbers from flat pieces, float32; no two copies of all are ever there."""
    import torch

    found, start = torch.empty(count), 0
    for piece in pieces:
        found[start : start + len(piece)] = piece
        start += len(piece)
    return found


def slices(count: int, width: int) -> Iterator[slice]:
    """Cut `count` rows of `width` numbers into pieces of about `CHUNK` numbers."""
    step = max(1, CHUNK // max(1, width))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def largest(numbers: Tensor, *, by_row: bool = False) -> Tensor:
    """The largest magnitude, or that of each row (rows, columns); 0 of no numbers. No copy."""
    import torch

    if not numbers.numel():
        return numbers.new_zeros(numbers.shape[0] if by_row else ())
    found: Tensor = torch.linalg.vector_norm(numbers, math.inf, dim=1 if by_row else None)
    return found


def divided(numbers: Tensor, by: Tensor) -> Tensor:
    """Finite numbers by scales, and 0 where a scale is 0."""
    return numbers / by.masked_fill(by == 0, math.inf)


def places(table: Sequence[float], numbers: Tensor) -> Tensor:
    """The place of the nearest entry of an ascending table, ties to even places; uint8."""
    import torch

    exact = torch.tensor(table, dtype=torch.float64)
    between = ((exact[1:] + exact[:-1]) / 2).float()
    # a tie goes to the place below it unless the bound lies under the tie
    lower = torch.nextafter(between, torch.full_like(between, -torch.inf))
    odd = torch.arange(len(between)) % 2 == 1
    return torch.bucketize(numbers, torch.where(odd, lower, between), out_int32=True).byte()


def nearest(table: Tensor, numbers: Tensor) -> Tensor:
    """The place of the nearest entry of a table in any order; uint8."""
    import torch

    ascending, order = table.float().sort(stable=True)
    between = (ascending[1:] + ascending[:-1]) / 2
    return order.byte()[torch.bucketize(numbers, between, out_int32=True)]


def widths(table: Tensor) -> Tensor:
    """Half the wider of the two gaps beside each entry of a table in any order."""
    import torch

    ascending, order = table.float().sort(stable=True)
    gaps = ascending.diff()
    beside = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
    return torch.empty_like(ascending).index_put_((order,), beside / 2)
