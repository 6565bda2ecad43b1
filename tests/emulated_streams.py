"""Streams of a device that is not there: what may be late is late, and what a real one would spoil is an error.

Kernels run at once. A copy that was asked for without waiting is made only when something waits for it; until then its target
holds 0xFF, NaN in every dtype. Errors are

- an operation on what another stream has made, or that another stream still has to copy, unless it was waited for;
- memory of the device that another stream reads and that its own does not know of (`record_stream`);
- a slab that is given back while a copy from it or to it is still to be made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Copy = Callable[[], None]
# one operation at a time: torch's own modes crash where two threads dispatch in Python at once
LOCK = threading.RLock()


def block(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


class Event:
    def __init__(self, model: Streams, stream: Stream) -> None:
        self.model, self.stream, self.at, self.steps = (
            model,
            stream,
            len(stream.queue),
            stream.steps,
        )

    def synchronize(self) -> None:
        self.model.waited.append(threading.current_thread().name)
        self.passed()

    def passed(self) -> None:
        with self.model.lock:
            self.stream.advance(self.at)


class Stream:
    def __init__(self, model: Streams, name: str) -> None:
        self.model, self.name = model, name
        self.queue: list[Copy] = []
        self.done = self.steps = 0  # copies made; kernels asked for
        self.behind: dict[Stream, int] = {}  # up to which kernel of another stream this one waits

    def advance(self, to: int) -> None:
        while self.done < to:
            self.done += 1
            self.queue[self.done - 1]()

    def record_event(self) -> Event:
        return Event(self.model, self)

    def wait_event(self, event: Event) -> None:
        self.behind[event.stream] = max(self.behind.get(event.stream, 0), event.steps)
        event.passed()


class Streams:
    """In the place of `torch.cuda`; also what `staging.lanes` asks about host memory."""

    def __init__(self) -> None:
        self.lock = LOCK
        self.here = threading.local()
        self.locked: dict[int, torch.Tensor] = {}
        self.absent: set[int] = set()  # blocks of the device that are still to be filled
        self.pending: dict[int, int] = {}  # copies still to be made, by the block of host memory
        self.made: dict[
            int, tuple[Stream, set[Stream], torch.Tensor]
        ] = {}  # by block of the device
        self.copies = 0
        self.waited: list[str] = []  # the threads that waited for an event
        self.first = Stream(self, "default")
        self.count = 0

    # what `torch.cuda` has

    def Stream(self, device: str) -> Stream:
        self.count += 1
        return Stream(self, f"{device}/{self.count}")

    def current_stream(self, device: str = "") -> Stream:
        return self._stack()[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._stack().append(stream)
        try:
            yield
        finally:
            self._stack().pop()

    def _stack(self) -> list[Stream]:
        if not hasattr(self.here, "stack"):
            self.here.stack = [self.first]
        stack: list[Stream] = self.here.stack
        return stack

    # host memory

    def page_locked(self, size: int) -> torch.Tensor:
        found = torch.empty(size, dtype=torch.uint8)
        self.locked[block(found)] = found  # kept, or its address would be another's
        return found

    def is_locked(self, tensor: torch.Tensor) -> bool:
        return block(tensor) in self.locked

    def checked(self, buffer: torch.Tensor) -> None:
        with self.lock:
            if self.pending.get(block(buffer)):
                raise RuntimeError("a slab is given back while a copy of it is still to be made")

    # copies

    def sent(self, host: torch.Tensor, found: torch.Tensor) -> None:
        """`found`, the copy of `host` on the device, holds its numbers later."""
        if not self.is_locked(host):
            raise RuntimeError("an asynchronous copy of memory that is not page-locked")
        with self.lock:
            here = self.current_stream()
            self.made[block(found)] = here, {here}, found
            self.absent.add(block(found))
            self._later(here, host, found, host, lambda: self.absent.discard(block(found)))

    def back(self, host: torch.Tensor, source: torch.Tensor) -> None:
        """`host` holds the numbers of `source`, on the device, later."""
        if not self.is_locked(host):
            raise RuntimeError("an asynchronous copy to memory that is not page-locked")
        with self.lock:
            out, here = self._stack()[-1], self._stack()[-2]
            if out.behind.get(here, 0) < here.steps:
                raise RuntimeError("a copy back does not wait for the kernels before it")
            self._later(out, host, host, source, lambda: self._known(source, out, "copied"))

    def _later(
        self, stream: Stream, place: torch.Tensor, to: torch.Tensor, of: torch.Tensor, then: Copy
    ) -> None:
        self.copies += 1
        to.reshape(-1).view(torch.uint8).fill_(255)
        self.pending[block(place)] = self.pending.get(block(place), 0) + 1

        def copy() -> None:
            with torch.inference_mode():
                to.copy_(of)
            self.pending[block(place)] -= 1
            then()

        stream.queue.append(copy)

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        with self.lock:
            if block(tensor) not in self.made:
                self.made[block(tensor)] = self.current_stream(), {self.current_stream()}, tensor
            self.made[block(tensor)][1].add(stream)

    # kernels

    def ran(self, given: list[torch.Tensor]) -> None:
        """A kernel of this thread has read, or will, these tensors of the device."""
        with self.lock:
            here = self.current_stream()
            here.steps += 1
            for tensor in given:
                if block(tensor) in self.made and here is not self.made[block(tensor)][0]:
                    self._known(tensor, here, "read")
                    if block(tensor) in self.absent:
                        raise RuntimeError(f"read on {here.name} before it is there")

    def _known(self, tensor: torch.Tensor, stream: Stream, what: str) -> None:
        if block(tensor) not in self.made or stream not in self.made[block(tensor)][1]:
            raise RuntimeError(f"{what} on {stream.name} without `record_stream`")
