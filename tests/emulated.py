"""A device that is not there: tensors that say they are on it, and refuse whatever a real one refuses.

Their numbers are computed on the CPU. What shows is where code mixes devices, makes a tensor on the wrong one, asks a device
for what only a CPU has (its memory, NumPy), or takes a path that no CPU takes: stacks, copies to a device and back. What
does not show is a GPU's own rounding, speed and memory.

    with emulated() as device:
        assert torch.ones(3, device=device).sum().item() == 3

With `narrow` it is such a device as Apple's MPS: it has no float64, no decomposition and no streams, and a copy to it may only
be asynchronous from page-locked memory. Else it has streams (tests/emulated_streams.py), on which copies are late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from adaptkit import engine
from adaptkit.linalg import precision
from adaptkit.staging import lanes
from adaptkit.staging.slabs import Ring
from tests.emulated_streams import LOCK, Streams

NAME = "emulated"
aten = torch.ops.aten
MOVES = (
    aten._to_copy.default,
    aten.copy_.default,
)  # between devices, as `tensor.to` and `tensor.copy_` do
SUMS = ("linalg_vector_norm",)  # of what is called linalg, no decomposition
DECOMPOSITIONS = (
    "linalg_",
    "_linalg_",
    "cholesky",
    "geqrf",
    "orgqr",
    "ormqr",
    "triangular_solve",
    "lu_",
)


class OnDevice(torch.Tensor):
    """A tensor of the device; `host` holds its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            host.stride(),
            host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} in a thread that does not know the device")

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first"
        )

    def record_stream(self, stream: Any) -> None:
        stream.model.record(self.host, stream)

    def data_ptr(self) -> int:
        raise RuntimeError("the host does not see a device's memory")


class _Device(TorchDispatchMode):
    def __init__(self, *, narrow: bool = False, streams: Streams | None = None) -> None:
        super().__init__()
        self.narrow, self.streams = narrow, streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found = self._done(func, args, dict(kwargs))
        if self.narrow:
            _refuse(func, args, kwargs, found)
        return found

    def _done(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in given if isinstance(tensor, OnDevice)]
        asked = kwargs.get("device")
        if (
            ours
            and func not in MOVES
            and any(t.dim() for t in given if not isinstance(t, OnDevice))
        ):
            shapes = [(tuple(t.shape), str(t.device)) for t in given]
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got {shapes}"
            )
        if self.streams is not None and ours and func not in MOVES:
            self.streams.ran([tensor.host for tensor in ours])
        there = bool(ours) if asked is None else torch.device(asked).type == NAME
        if func is aten.copy_.default:
            there = isinstance(args[0], OnDevice)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        if there != bool(ours) and isinstance(found, torch.Tensor):
            # in inference mode `to` copies nothing here, and a device shares no memory with its host
            given = [_host(tensor).untyped_storage().data_ptr() for tensor in given]
            found = found.clone() if found.untyped_storage().data_ptr() in given else found
        if not there:
            return found
        written = {
            id(tensor.host): tensor for tensor in ours
        }  # in place: the same tensor comes back
        return tree_map(lambda leaf: written.get(id(leaf), _wrapped(leaf)), found)


def _refuse(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
    """What a device without float64 and decompositions refuses."""
    given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [leaf for leaf in [*given, *_leaves(found)] if isinstance(leaf, OnDevice)]
    name = str(func).removeprefix("aten.")
    if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in ours):
        raise TypeError(f"the device has no float64 ({name})")
    if ours and name.startswith(DECOMPOSITIONS) and not name.startswith(SUMS):
        raise NotImplementedError(f"the device has no {name}")
    hosts = [tensor for tensor in given if not isinstance(tensor, OnDevice)]
    if ours and func in MOVES and hosts and (kwargs.get("non_blocking") or True in args[2:]):
        raise RuntimeError("an asynchronous copy of memory that is not page-locked")


class _Made(TorchFunctionMode):
    """What goes past the dispatcher: `torch.tensor`, `new_tensor`, `x[[0, 2]]`, and in inference mode `x.to(y)`; streams."""

    def __init__(self, streams: Streams | None = None) -> None:
        super().__init__()
        self.streams = streams

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with LOCK:
            return self._done(func, args, dict(kwargs or {}))

    def _done(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.streams is not None and kwargs.get("non_blocking"):
            return self._late(self.streams, func(*args, **kwargs), *args)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(args[0].device)]
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.Tensor):
            return args[0].to(args[1].dtype).to(args[1].device)
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(torch.device(device))
        return func(*args, **kwargs)

    def _late(self, streams: Streams, found: Any, one: Any, other: Any) -> Any:
        if isinstance(other, OnDevice):
            streams.back(found, other.host)
        else:
            streams.sent(one, found.host)
        return found


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnDevice) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf


def available() -> bool:
    """Whether this torch lets Python register a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME)


@contextmanager
def emulated(*, narrow: bool = False) -> Iterator[str]:
    """The name of the device, which there is in this block and in the engine's threads.

    PyTorch keeps a device that it once had (`torch.accelerator` names it ever after): for processes of their own.
    """
    _register()
    streams = None if narrow else Streams()

    def within(body: Callable[..., None]) -> Callable[..., None]:
        def wrapped(pipeline: Any, *args: Any) -> None:
            if pipeline.resources.device.startswith(NAME):
                with _Device(narrow=narrow, streams=streams), _Made(streams):
                    return body(pipeline, *args)
            return body(pipeline, *args)

        return wrapped

    threads = {
        name: within(getattr(engine._Pipeline, name)) for name in ("_read", "_compute", "_write")
    }
    lacking = precision.NARROW | ({NAME} if narrow else set())
    with (
        mock.patch.multiple(engine._Pipeline, **threads),
        mock.patch.object(precision, "NARROW", lacking),
        _streaming(streams),
        _Device(narrow=narrow, streams=streams),
        _Made(streams),
    ):
        yield f"{NAME}:0"


@contextmanager
def _streaming(streams: Streams | None) -> Iterator[None]:
    """Let the engine find the device's streams, and page-locked memory."""
    if streams is None:
        yield
        return
    module, give = lanes.streams_of, Ring.give

    def given(ring: Ring, slab: Any) -> None:
        streams.checked(slab.buffer)
        give(ring, slab)

    with (
        mock.patch.multiple(
            lanes,
            streams_of=lambda name: streams if name.startswith(NAME) else module(name),
            page_locked=streams.page_locked,
            is_locked=lambda tensor: tensor.device.type == "cpu" and streams.is_locked(tensor),
        ),
        mock.patch.object(Ring, "give", given),
    ):
        yield
