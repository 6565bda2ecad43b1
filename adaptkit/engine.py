"""The one engine: steps in buckets of equal shape, read ahead, computed on the device, written behind.

Planning (`Step`, `check_memory`) needs no torch.

At most three buckets are alive at any time, so peak memory is a number the plan can print.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from adaptkit.errors import AdaptkitError, NotEnoughMemory

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_MEMORY", "Bucket", "Resources", "Step", "Work", "buckets", "check_memory", "peak_memory", "run"]

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")

DEFAULT_MEMORY = 1_000_000_000  # bytes of working memory, torch itself (about 250 MB) not counted
ALIVE = 3  # buckets alive at once: being read, computed, written
_POLL = 0.2  # seconds between looks at the stop flag while a queue is full or empty


@dataclass(frozen=True)
class Step(Generic[P]):
    """One unit of work: steps of equal `shape` may be stacked; `bytes` is peak working memory; `order` the place on disk."""

    payload: P
    shape: Hashable
    bytes: int
    order: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Bucket(Generic[P]):
    """Steps of equal shape that are computed together."""

    steps: tuple[Step[P], ...]

    @property
    def payloads(self) -> tuple[P, ...]:
        """What the steps are about."""
        return tuple(step.payload for step in self.steps)


@dataclass(frozen=True)
class Resources:
    """Where to compute and how much working memory (bytes) may be used."""

    device: str = "cpu"
    memory: int = DEFAULT_MEMORY

    @classmethod
    def choose(cls, device: str = "auto", memory: int | None = None) -> Resources:
        """Resolve `auto` and check that the device is there."""
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise AdaptkitError("no CUDA device is available", hint="use --device cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise AdaptkitError(f"device {device!r} cannot be used: {error}") from None
        return cls(device, DEFAULT_MEMORY if memory is None else memory)

    @property
    def on_cpu(self) -> bool:
        """Whether tensors stay in host memory."""
        return self.device.partition(":")[0] == "cpu"


def check_memory(steps: Iterable[Step[P]], memory: int | None) -> None:
    """NotEnoughMemory where a single step does not fit the bound (None: the default)."""
    bound = DEFAULT_MEMORY if memory is None else memory
    largest = max((step.bytes for step in steps), default=0)
    if largest > bound:
        raise NotEnoughMemory(
            f"one layer needs {largest / 1e6:.1f} MB of working memory; the bound is {bound / 1e6:.1f} MB",
            hint="raise --memory",
        )


def peak_memory(steps: Iterable[Step[P]]) -> int:
    """At most how many bytes are in use at once on a CPU: the buckets that may be alive, each the largest step."""
    return sum(sorted((step.bytes for step in steps), reverse=True)[:ALIVE])


def buckets(steps: Iterable[Step[P]], resources: Resources) -> Iterator[Bucket[P]]:
    """Cut steps into buckets, in file order of their first members.

    On a CPU a bucket is one step: stacking sixty-four rank-16 cores was slower there than a loop. On a GPU equal shapes
    fill the memory bound. NotEnoughMemory where a single step does not fit.
    """
    ordered = sorted(steps, key=lambda step: step.order)
    check_memory(ordered, resources.memory)
    if resources.on_cpu:
        return iter([Bucket((step,)) for step in ordered])
    return _stacked(ordered, resources.memory // ALIVE)


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


Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Work(Generic[P, R]):
    """What to do with a step: `load` its tensors (reader thread), compute a bucket's results, `store` one (writer thread).

    `kernel` gets the payloads and the stacked tensors, each with one leading dimension, on the device.
    """

    load: Callable[[P], Tensors]
    kernel: Callable[[tuple[P, ...], dict[str, Tensor]], Sequence[R]]
    store: Callable[[P, R], None]


def run(
    steps: Iterable[Step[P]],
    work: Work[P, R],
    resources: Resources,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Stream all steps through `work`, results stored in bucket order; the first error of any thread is raised here.

    `progress` is called with the number of steps done. On return or error no thread is left running.
    """
    pipeline = _Pipeline(work, resources, progress or (lambda _: None))
    pipeline.run(list(buckets(steps, resources)))


class _Stopped(Exception):
    pass


class _Pipeline(Generic[P, R]):
    def __init__(self, work: Work[P, R], resources: Resources, progress: Callable[[int], None]) -> None:
        self.work = work
        self.resources = resources
        self.progress = progress
        self.stop = threading.Event()
        self.failure: list[BaseException] = []
        self.room = threading.Semaphore(ALIVE)
        self.loaded: queue.Queue[tuple[Bucket[P], dict[str, Tensor]] | None] = queue.Queue(1)
        self.done: queue.Queue[tuple[Bucket[P], Sequence[R]] | None] = queue.Queue(1)

    def run(self, todo: Sequence[Bucket[P]]) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(self._read, todo), name="adaptkit-read", daemon=True),
            threading.Thread(target=self._guarded, args=(self._write,), name="adaptkit-write", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._compute()
        except _Stopped:
            pass
        except BaseException:
            self.stop.set()
            raise
        finally:
            for thread in threads:
                thread.join()
        if self.failure:
            raise self.failure[0]

    def _guarded(self, body: Callable[..., None], *args: object) -> None:
        try:
            body(*args)
        except _Stopped:
            pass
        except BaseException as error:
            self.failure.append(error)
            self.stop.set()

    def _put(self, where: queue.Queue[T], item: T) -> None:
        while True:
            if self.stop.is_set():
                raise _Stopped
            try:
                return where.put(item, timeout=_POLL)
            except queue.Full:
                continue

    def _get(self, where: queue.Queue[T]) -> T:
        while True:
            if self.stop.is_set():
                raise _Stopped
            try:
                return where.get(timeout=_POLL)
            except queue.Empty:
                continue

    def _read(self, todo: Sequence[Bucket[P]]) -> None:
        for bucket in todo:
            self._wait_for_room()
            self._put(self.loaded, (bucket, self._stack([self.work.load(p) for p in bucket.payloads])))
        self._put(self.loaded, None)

    def _wait_for_room(self) -> None:
        while not self.room.acquire(timeout=_POLL):
            if self.stop.is_set():
                raise _Stopped

    def _stack(self, loaded: list[Tensors]) -> dict[str, Tensor]:
        if len(loaded) == 1:
            return {key: tensor.unsqueeze(0) for key, tensor in loaded[0].items()}
        import torch

        stacked = {key: torch.stack([tensors[key] for tensors in loaded]) for key in loaded[0]}
        if torch.device(self.resources.device).type != "cuda":
            return stacked
        return {key: tensor.pin_memory() for key, tensor in stacked.items()}

    def _compute(self) -> None:
        while (item := self._get(self.loaded)) is not None:
            bucket, host = item
            tensors = {key: tensor.to(self.resources.device, non_blocking=True) for key, tensor in host.items()}
            del item, host
            results = self.work.kernel(bucket.payloads, tensors)
            del tensors
            self._put(self.done, (bucket, results))
        self._put(self.done, None)

    def _write(self) -> None:
        finished = 0
        while (item := self._get(self.done)) is not None:
            bucket, results = item
            for payload, result in zip(bucket.payloads, results, strict=True):
                self.work.store(payload, result)
                finished += 1
                self.progress(finished)
            del item, results
            self.room.release()
