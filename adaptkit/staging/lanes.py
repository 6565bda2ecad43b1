"""Copies to a device and back beside its computing, on streams of their own where it has them.

A copy of page-locked memory is done some time after it was asked for. So a stack is sent by the
thread that has read it, two threads compute, each on a stream, and results are waited for by the
thread that writes them. Other devices copy when they are asked to: one thread sends and computes.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adaptkit.staging.slabs import Staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from adaptkit.staging.slabs import Slab

__all__ = ["Lanes", "Later", "Leaving", "Sent", "back", "lanes_of", "settled"]

R = TypeVar("R")

# while one thread waits for a number, or for what the host solves, the other's stack is computed
THREADS = 2


class Later(Generic[R]):
    """A result that is made in the writer thread, when its copies to the host are done.

    `nbytes` is what it holds in host memory until then.
    """

    def __init__(self, make: Callable[[], R], nbytes: int) -> None:
        self.make, self.nbytes = make, nbytes


def settled(result: Any) -> Any:
    """The result itself, or what it was to become."""
    return result.make() if isinstance(result, Later) else result


class Sent:
    """A stack on its way to the device; `event` tells when it is there."""

    def __init__(self, tensors: dict[str, Tensor], event: Any) -> None:
        self.tensors, self.event = tensors, event


Host = dict[str, "Tensor"] | Staged  # a stack in host memory


class Leaving:
    """What a parcel copies to the host: here, nothing is left to wait for."""

    def back(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory."""
        return tensor.cpu()

    def undo(self) -> None:
        """Forget what has been copied since the last `keep`."""

    def keep(self) -> None:
        """What has been copied so far is a result."""

    def close(self) -> None:
        """Nothing more is copied."""

    def wait(self) -> None:
        """Wait until all is in host memory, and all that the device reads there has been read."""


class _Here(threading.local):
    leaving: Leaving | None = None


_here = _Here()


def back(tensor: Tensor) -> Tensor:
    """A tensor in host memory, for what a kernel gives to be stored.

    In a kernel that a device with streams computes, its numbers are there only when the result is
    stored: what is made of them must be made then, see `Later`.
    """
    return tensor.cpu() if _here.leaving is None else _here.leaving.back(tensor)


class Lanes:
    """Of a device without streams, or of the CPU: each copy is done when it returns."""

    threads = 1  # that compute at once
    apart = 1  # slabs' worth of results that lie outside of slabs

    def __init__(self, device: str) -> None:
        self.device = device

    def memory(self, size: int) -> Tensor:
        """Host memory of so many bytes, uint8, for copies to the device and back."""
        import torch

        return torch.empty(size, dtype=torch.uint8)

    def send(self, host: Host) -> Host | Sent:
        """Ask for the copy of a stack, in the thread that has read it."""
        return host

    def arrived(self, stack: Host | Sent) -> dict[str, Tensor]:
        """The tensors of a stack on the device, each original dropped as it is moved."""
        assert not isinstance(stack, Sent)
        return _moved(stack, lambda tensor: tensor.to(self.device))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For a thread that computes."""
        yield

    @contextmanager
    def leaving(self, slab: Slab | None) -> Iterator[Leaving]:
        """For what a parcel gives; `back` of this thread copies into its slab."""
        del slab
        yield Leaving()


class _Streams(Lanes):
    """Of a device with streams and events, by torch's module for it."""

    threads, apart = THREADS, 0

    def __init__(self, device: str, module: Any) -> None:
        super().__init__(device)
        self.module = module
        self.inward, self.outward = module.Stream(device), module.Stream(device)

    def memory(self, size: int) -> Tensor:
        return page_locked(size)

    def send(self, host: Host) -> Host | Sent:
        with self.module.stream(self.inward):
            tensors = _moved(host, self._sent)
            return Sent(tensors, self.inward.record_event())

    def _sent(self, tensor: Tensor) -> Tensor:
        # pageable memory may be used again before an asynchronous copy has read it
        return tensor.to(self.device, non_blocking=is_locked(tensor))

    def arrived(self, stack: Host | Sent) -> dict[str, Tensor]:
        stack = stack if isinstance(stack, Sent) else self.send(stack)
        assert isinstance(stack, Sent)
        here = self.module.current_stream(self.device)
        here.wait_event(stack.event)
        for tensor in stack.tensors.values():
            tensor.record_stream(here)  # its memory is used again only behind what reads it here
        tensors, stack.tensors = stack.tensors, {}
        return tensors

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self.module.stream(self.module.Stream(self.device)):
            yield

    @contextmanager
    def leaving(self, slab: Slab | None) -> Iterator[Leaving]:
        assert slab is not None
        made = _Outward(self, slab)
        _here.leaving = made
        try:
            yield made
        finally:
            _here.leaving = None


class _Outward(Leaving):
    """Copies to the slab of a parcel, on the stream that leads back."""

    def __init__(self, lanes: _Streams, slab: Slab) -> None:
        self.lanes, self.slab = lanes, slab
        self.event: Any = None
        self.kept = slab.used

    def back(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" or not tensor.numel():
            return tensor.cpu()
        # results that the plan did not count have memory of their own
        whole, lanes = tensor.contiguous(), self.lanes
        room = self.slab.take(whole.nbytes)
        host = lanes.memory(whole.nbytes) if room is None else room
        host = host.view(whole.dtype).reshape(whole.shape)
        self._follow()
        whole.record_stream(lanes.outward)
        with lanes.module.stream(lanes.outward):
            host.copy_(whole, non_blocking=True)
        return host

    def _follow(self) -> None:
        """Let what leads back wait for what this thread has asked for so far."""
        here = self.lanes.module.current_stream(self.lanes.device)
        self.lanes.outward.wait_event(here.record_event())

    def undo(self) -> None:
        self.close()
        self.wait()
        self.slab.used = self.kept

    def keep(self) -> None:
        self.kept = self.slab.used

    def close(self) -> None:
        self._follow()
        self.event = self.lanes.outward.record_event()

    def wait(self) -> None:
        self.event.synchronize()


def _moved(host: Host, send: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    if isinstance(host, Staged):
        return host.sent(send)
    return {key: send(host.pop(key)) for key in list(host)}


def page_locked(size: int) -> Tensor:
    """Host memory that a device reads and writes by itself, uint8."""
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def is_locked(tensor: Tensor) -> bool:
    """Whether a copy of host memory may be asynchronous."""
    return tensor.device.type == "cpu" and tensor.is_pinned()


def streams_of(device: str) -> Any:
    """torch's module for a device whose streams and events are used here; None without one."""
    import torch

    return torch.cuda if device.partition(":")[0] == "cuda" else None


def lanes_of(device: str) -> Lanes:
    """How a device is given stacks and gives results."""
    module = streams_of(device)
    return Lanes(device) if module is None else _Streams(device, module)
