"""Slabs of host memory that are made once and read into, so that a stack lies in one piece.

A device gets a stack of equal layers. Read layer by layer and stacked, every byte would be copied
twice in host memory before it is sent. Here the files are read to where the stack lies: the first
layer reserves room for all, in the order of its reads, and every other one reads into its place.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

from adaptkit.files.tensors import reading_into

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

__all__ = ["Ring", "Slab", "Staged", "alike"]

ALIGNED = 64  # bytes: where a tensor of any dtype may begin
_POLL = 0.2  # seconds between checks of whether the run goes on

Place = tuple[int, "torch.dtype", tuple[int, ...]]  # offset, dtype, shape with the stack


class Slab:
    """Host memory (uint8) for the stacks of a parcel, and what they become, one after the other."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.used = 0

    def reserve(self, size: int) -> int | None:
        """The offset of `size` more bytes; None if there is no room."""
        start = -(-self.used // ALIGNED) * ALIGNED
        if start + size > len(self.buffer):
            return None
        self.used = start + size
        return start

    def take(self, size: int) -> Tensor | None:
        """`size` more bytes; None if there is no room."""
        start = self.reserve(size)
        return None if start is None else self.buffer[start : start + size]

    def stack(self, loads: Sequence[Callable[[], Mapping[str, Tensor]]]) -> Staged:
        """Load equal members side by side."""
        start = self.reserve(0)
        made = _Stack(self, len(loads))
        loaded = [made.loaded(n, load) for n, load in enumerate(loads)]
        places: dict[str, Place | Tensor] = {
            key: made.place(alike(key, loaded)) for key in loaded[0]
        }
        return Staged(self.buffer, self.used if start is None else start, self.used, places)


class _Stack:
    """What the members of a stack have reserved, in the order of their reads."""

    def __init__(self, slab: Slab, members: int) -> None:
        self.slab, self.members = slab, members
        self.blocks: list[tuple[int | None, int]] = []  # offset, and the bytes of one member

    def loaded(self, number: int, load: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        reads = iter(range(1 << 30))

        def take(size: int) -> Tensor | None:
            at = self._block(next(reads), size)
            return None if at is None else self.slab.buffer[at + number * size :][:size]

        with reading_into(take):
            return load()

    def _block(self, which: int, size: int) -> int | None:
        if which == len(self.blocks):
            self.blocks.append((self.slab.reserve(self.members * size), size))
        offset, own = self.blocks[which] if which < len(self.blocks) else (None, size)
        return offset if own == size else None

    def place(self, tensors: Sequence[Tensor]) -> Place | Tensor:
        """Where the stack of these tensors lies; a tensor of its own if the slab has no room."""
        import torch

        first = tensors[0]
        offset = self._offset(first)
        apart = (self._offset(t) != (offset or 0) + n * t.nbytes for n, t in enumerate(tensors))
        if offset is None or any(apart):
            # made by the loader, or read in another order than that of the first
            offset = self.slab.reserve(self.members * first.nbytes) if first.numel() else None
            if offset is None:
                return torch.stack(list(tensors))
            whole = self.slab.buffer[offset:][: self.members * first.nbytes].view(first.dtype)
            torch.stack(list(tensors), out=whole.view(self.members, *first.shape))
        return offset, first.dtype, (self.members, *first.shape)

    def _offset(self, tensor: Tensor) -> int | None:
        """Where a tensor lies in the slab; None if it lies elsewhere, or not in one piece."""
        storage, ours = tensor.untyped_storage(), self.slab.buffer.untyped_storage()
        if not tensor.numel() or storage.data_ptr() != ours.data_ptr():
            return None
        return int(tensor.storage_offset()) * tensor.itemsize if tensor.is_contiguous() else None


def alike(key: str, loaded: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The tensors of a stack, which torch would promote to one dtype without a word."""
    found = [tensors[key] for tensors in loaded]
    if any((tensor.dtype, tensor.shape) != (found[0].dtype, found[0].shape) for tensor in found):
        raise RuntimeError(f"{key!r} differs within a stack")
    return found


class Staged:
    """A stack in a slab, bytes [start, stop), to be sent at once."""

    def __init__(
        self, buffer: Tensor, start: int, stop: int, places: Mapping[str, Place | Tensor]
    ) -> None:
        self.buffer, self.start, self.stop, self.places = buffer, start, stop, places

    def sent(self, send: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Its tensors after `send` has moved the bytes: at once, or without those not needed."""
        held = [place for place in self.places.values() if isinstance(place, tuple)]
        # what a loader reads and makes something else of is not sent
        spare = self.stop - self.start - sum(map(_bytes, held))
        whole = send(self.buffer[self.start : self.stop]) if held and spare <= self._gaps else None
        return {key: self._found(place, whole, send) for key, place in self.places.items()}

    @property
    def _gaps(self) -> int:
        return ALIGNED * len(self.places)

    def _found(
        self, place: Place | Tensor, whole: Tensor | None, send: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if not isinstance(place, tuple):
            return send(place)
        offset, dtype, shape = place
        stop = offset + _bytes(place)
        if whole is None:
            found = send(self.buffer[offset:stop])
        else:
            found = whole[offset - self.start : stop - self.start]
        return found.view(dtype).reshape(shape)


def _bytes(place: Place) -> int:
    return math.prod(place[2]) * place[1].itemsize


class Ring:
    """At most `count` slabs of `size` bytes, made at first use and used again until the end.

    `memory` makes so many bytes of host memory, uint8.
    """

    def __init__(self, size: int, count: int, memory: Callable[[int], Tensor]) -> None:
        self.size, self.left, self.memory = size, count, memory
        self.free: list[Slab] = []
        self.changed = threading.Condition()

    def take(self, goes_on: Callable[[], bool]) -> Slab | None:
        """An empty slab, as soon as there is one; None if the run ends before."""
        with self.changed:
            while not (self.free or self.left):
                if not goes_on():
                    return None
                self.changed.wait(_POLL)
            if self.free:
                return self.free.pop()
            self.left -= 1
        return Slab(self.memory(self.size))

    def give(self, slab: Slab) -> None:
        """Give back a slab that nothing reads or writes any more."""
        slab.used = 0
        with self.changed:
            self.free.append(slab)
            self.changed.notify()
