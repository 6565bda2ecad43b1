"""Steps of work, and the memory and stacks that they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from adaptkit.errors import AdaptkitError, NotEnoughMemory
from adaptkit.process import torch_threads

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

__all__ = [
    "BESIDE",
    "DEFAULT_MEMORY",
    "NEAR",
    "PARCEL",
    "ROUNDS",
    "Bucket",
    "Resources",
    "Step",
    "bound",
    "buckets",
    "check_memory",
    "peak_memory",
]

P = TypeVar("P")

# bytes of working memory, without torch itself (about 250 MB); raised if one step needs more
DEFAULT_MEMORY = 560_000_000
PARCEL = 16_000_000  # bytes of working memory: smaller buckets are handed over together
NEAR = 128  # steps: equal shapes within this distance may be stacked on a CPU
BESIDE = 2  # parcels read ahead of the computed ones
# a parcel takes at most 1/ROUNDS of the remaining buckets per worker, a stack 1/ROUNDS of all steps
ROUNDS = 4


@dataclass(frozen=True)
class Step(Generic[P]):
    """One unit of work. Steps of equal `shape` may be stacked.

    `bytes` is peak working memory, `order` the position on disk.
    """

    payload: P
    shape: Hashable
    bytes: int
    order: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Bucket(Generic[P]):
    """Steps of equal shape, computed together."""

    steps: tuple[Step[P], ...]

    @property
    def payloads(self) -> tuple[P, ...]:
        """The payloads of the steps."""
        return tuple(step.payload for step in self.steps)

    @property
    def bytes(self) -> int:
        """Working memory of all steps."""
        return sum(step.bytes for step in self.steps)


@dataclass(frozen=True)
class Resources:
    """Device, working memory in bytes (None: the default), and number of workers."""

    device: str = "cpu"
    memory: int | None = None
    workers: int = 1

    @classmethod
    def choose(cls, device: str = "auto", memory: int | None = None) -> Resources:
        """Resolve `auto` and check that the device exists."""
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise AdaptkitError("no CUDA device is available", hint="use --device cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise AdaptkitError(f"device {device!r} cannot be used: {error}") from None
        return cls(device, memory, torch_threads() if device.startswith("cpu") else 1)

    @property
    def on_cpu(self) -> bool:
        """Whether tensors stay in host memory."""
        return self.device.partition(":")[0] == "cpu"


def check_memory(steps: Iterable[Step[P]], memory: int | None) -> None:
    """Raise `NotEnoughMemory` if a single step exceeds the requested bound."""
    largest = max((step.bytes for step in steps), default=0)
    if memory is not None and largest > memory:
        raise NotEnoughMemory(
            f"one layer needs {largest / 1e6:.1f} MB of working memory; "
            f"the bound is {memory / 1e6:.1f} MB",
            hint="raise --memory",
        )


def bound(steps: Iterable[Step[P]], memory: int | None) -> int:
    """The bound in bytes: requested, else default or largest step."""
    return max([DEFAULT_MEMORY, *(step.bytes for step in steps)]) if memory is None else memory


def peak_memory(steps: Iterable[Step[P]], memory: int | None = None) -> int:
    """Upper bound on the bytes in use at once on a CPU."""
    listed = list(steps)
    return min(bound(listed, memory), sum(step.bytes for step in listed))


def buckets(steps: Iterable[Step[P]], resources: Resources, stack: int = 1) -> Iterator[Bucket[P]]:
    """Group steps into buckets, in file order of their first members.

    On a CPU, a bucket has at most `stack` small steps of equal shape and a parcel's bytes, and each
    worker gets some. That saves most switches between Python threads and does not change results.
    On a GPU, equal shapes fill the memory bound. Raises `NotEnoughMemory` for a step that does not
    fit.
    """
    ordered = sorted(steps, key=lambda step: step.order)
    check_memory(ordered, resources.memory)
    # one bucket is computed while BESIDE others are read
    room = bound(ordered, resources.memory) // (1 + BESIDE)
    if not resources.on_cpu:
        return _stacked(ordered, room)
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


def _stacked(ordered: Sequence[Step[P]], room: int) -> Iterator[Bucket[P]]:
    groups: dict[Hashable, list[Step[P]]] = {}
    for step in ordered:
        groups.setdefault(step.shape, []).append(step)
    for group in groups.values():
        held: list[Step[P]] = []
        for step in group:
            if held and sum(s.bytes for s in held) + step.bytes > room:
                yield Bucket(tuple(held))
                held = []
            held.append(step)
        yield Bucket(tuple(held))
