"""Steps of work, and the memory and stacks that they are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from adaptkit.errors import AdaptkitError, NotEnoughMemory
from adaptkit.process import cores, free_memory, free_on, torch_threads

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

__all__ = [
    "BESIDE",
    "DEFAULT_MEMORY",
    "IN_FLIGHT",
    "NEAR",
    "PARCEL",
    "ROUNDS",
    "Bucket",
    "Resources",
    "Step",
    "bound",
    "buckets",
    "check_memory",
    "default_memory",
    "peak_memory",
]

P = TypeVar("P")

# bytes of working memory, without torch itself (about 250 MB), of a machine of two cores; raised
# if one step needs more
DEFAULT_MEMORY = 560_000_000
OURS = 4  # one in so many of the bytes that are free may be taken by default
PARCEL = 16_000_000  # bytes of working memory: smaller buckets are handed over together
NEAR = 128  # steps: equal shapes within this distance may be stacked on a CPU
BESIDE = 2  # parcels read ahead of the computed ones
# a parcel takes at most 1/ROUNDS of the remaining buckets per worker, a stack 1/ROUNDS of all steps
ROUNDS = 4
# parcels of a device from the first byte read to the last one written: one is read, two are
# computed, one is written
IN_FLIGHT = 4
SHARE = 0.88 / IN_FLIGHT  # of a device's free memory that a stack may take


@dataclass(frozen=True)
class Step(Generic[P]):
    """One unit of work. Steps of equal `shape` may be stacked.

    `bytes` is peak working memory, `order` the position on disk. `host` is what stays in host
    memory while a device computes the step: what is read and what is written (None: all of it).
    """

    payload: P
    shape: Hashable
    bytes: int
    order: tuple[int, int] = (0, 0)
    host: int | None = None


@dataclass(frozen=True)
class Bucket(Generic[P]):
    """Steps of equal shape, computed together, on a device if `away`."""

    steps: tuple[Step[P], ...]
    away: bool = False

    @property
    def payloads(self) -> tuple[P, ...]:
        """The payloads of the steps."""
        return tuple(step.payload for step in self.steps)

    @property
    def bytes(self) -> int:
        """Host memory of all steps."""
        return sum(map(_on_host if self.away else _in_all, self.steps))


@dataclass(frozen=True)
class Resources:
    """Device, working memory in bytes (None: the default), and number of workers.

    `memory` bounds host memory, `room` (None: not known) stacks on the device. `notes` tell of a
    device that was asked for and not taken.
    """

    device: str = "cpu"
    memory: int | None = None
    workers: int = 1
    room: int | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        memory: int | None = None,
        *,
        gains: bool = True,
        wide: bool = True,
    ) -> Resources:
        """Resolve `auto` and check that the device exists, before anything is read.

        `auto` takes a GPU if the work `gains` by it. `wide` work needs float64 and decompositions:
        it is left to the CPU, with a note, on a device that has none.
        """
        import torch

        from adaptkit.linalg.precision import supports_float64

        if device == "auto":
            device = "cuda" if gains and torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise AdaptkitError("no CUDA device is available", hint="use --device cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise AdaptkitError(f"device {device!r} cannot be used: {error}") from None
        notes: tuple[str, ...] = ()
        if wide and not supports_float64(device):
            notes = (f"Computed on the CPU: {device} has no float64 and no decompositions.",)
            device = "cpu"
        if device.startswith("cpu"):
            return cls(device, memory, torch_threads(), notes=notes)
        free = free_on(device)
        return cls(device, memory, room=None if free is None else int(free * SHARE))

    @property
    def on_cpu(self) -> bool:
        """Whether tensors stay in host memory."""
        return self.device.partition(":")[0] == "cpu"

    @property
    def apart(self) -> bool:
        """Whether a device has memory of its own, of a size that it tells."""
        return self.room is not None


def _in_all(step: Step[P]) -> int:
    return step.bytes


def _on_host(step: Step[P]) -> int:
    return step.bytes if step.host is None else step.host


def check_memory(steps: Iterable[Step[P]], memory: int | None, *, away: bool = False) -> None:
    """Raise `NotEnoughMemory` if a single step exceeds the requested bound.

    `away` if a device computes: then only what is read and written counts.
    """
    largest = max(map(_on_host if away else _in_all, steps), default=0)
    if memory is not None and largest > memory:
        raise NotEnoughMemory(
            f"one layer needs {largest / 1e6:.1f} MB of working memory; "
            f"the bound is {memory / 1e6:.1f} MB",
            hint="raise --memory",
        )


def bound(steps: Iterable[Step[P]], memory: int | None, *, away: bool = False) -> int:
    """The bound in bytes: requested, else default or largest step; `away` as in `check_memory`."""
    sizes = map(_on_host if away else _in_all, steps)
    return max([default_memory(), *sizes]) if memory is None else memory


@cache
def default_memory() -> int:
    """The bound without `--memory`: so much for each core, as far as what is free allows.

    Asked once per process, so that a run keeps to what its plan tells.
    """
    wanted = DEFAULT_MEMORY * cores() // 2
    free = free_memory()
    return max(DEFAULT_MEMORY, min(wanted, (free or 0) // OURS))


def peak_memory(steps: Iterable[Step[P]], memory: int | None = None) -> int:
    """Upper bound on the bytes in use at once on a CPU."""
    listed = list(steps)
    return min(bound(listed, memory), sum(step.bytes for step in listed))


def buckets(steps: Iterable[Step[P]], resources: Resources, stack: int = 1) -> Iterator[Bucket[P]]:
    """Group steps into buckets, in file order of their first members.

    On a CPU, a bucket has at most `stack` small steps of equal shape and a parcel's bytes, and each
    worker gets some. That saves most switches between Python threads and does not change results.
    On a device, equal shapes fill what is free of its memory, and as much of the bound as is left
    for each of those read ahead. Raises `NotEnoughMemory` for a step that does not fit.
    """
    ordered = sorted(steps, key=lambda step: step.order)
    check_memory(ordered, resources.memory, away=resources.apart)
    most = bound(ordered, resources.memory, away=resources.apart)
    if not resources.on_cpu:
        return _stacked(ordered, most // IN_FLIGHT, resources.room)
    room = most // (1 + BESIDE)  # one bucket is computed while BESIDE others are read
    return _few(
        ordered, min(PARCEL, room), min(stack, max(1, len(ordered) // (ROUNDS * resources.workers)))
    )


def _few(ordered: Sequence[Step[P]], room: int, most: int) -> Iterator[Bucket[P]]:
    """Group small neighbours of equal shape, so that files are still read forwards."""
    groups: list[list[Step[P]]] = []
    latest: dict[Hashable, tuple[int, list[Step[P]]]] = {}
    for n, step in enumerate(ordered):
        start, group = latest.get(step.shape, (n, []))
        if (
            not 0 < len(group) < most
            or n - start >= NEAR
            or step.bytes + sum(s.bytes for s in group) > room
        ):
            group = []
            latest[step.shape] = n, group
            groups.append(group)
        group.append(step)
    return (Bucket(tuple(group)) for group in groups)


def _stacked(ordered: Sequence[Step[P]], room: int, device: int | None) -> Iterator[Bucket[P]]:
    """Fill `room` bytes of host memory and `device` bytes of the device's (None: not known)."""
    away = device is not None
    sizes = _on_host if away else _in_all
    groups: dict[Hashable, list[Step[P]]] = {}
    for step in ordered:
        groups.setdefault(step.shape, []).append(step)
    for group in groups.values():
        held: list[Step[P]] = []
        here = there = 0
        for step in group:
            here, there = here + sizes(step), there + step.bytes
            if held and (here > room or (device is not None and there > device)):
                yield Bucket(tuple(held), away)
                held, here, there = [], sizes(step), step.bytes
            held.append(step)
        yield Bucket(tuple(held), away)
