"""Run steps in buckets: read ahead, compute, write behind.

Planning (`Step`, `check_memory`) needs no torch. On a CPU every core computes its own step with one
thread. That is faster than all cores on one step, because factors are small, and results cannot
depend on the number of cores. Tensors being read, computed and written never exceed the memory
bound, so that a plan can print its peak memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from adaptkit.process import (
    explained,
    one_thread_here,
    out_of_memory,
    release,
    short_turns,
)
from adaptkit.staging.budget import Budget
from adaptkit.staging.lanes import Lanes, Later, Leaving, Sent, lanes_of, settled
from adaptkit.staging.slabs import Ring, Slab, Staged, alike
from adaptkit.steps import (
    BESIDE,
    DEFAULT_MEMORY,
    IN_FLIGHT,
    NEAR,
    PARCEL,
    ROUNDS,
    Bucket,
    Resources,
    Step,
    bound,
    buckets,
    check_memory,
    peak_memory,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BESIDE",
    "DEFAULT_MEMORY",
    "NEAR",
    "PARCEL",
    "ROUNDS",
    "Bucket",
    "Resources",
    "Step",
    "Work",
    "bound",
    "buckets",
    "check_memory",
    "peak_memory",
    "run",
]

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")

READERS = 3  # of a device's data: one thread reads slower than a bus takes
_PATIENCE = 1.0  # seconds that an interrupt waits for threads to end
_POLL = 0.2  # seconds between checks of the stop flag while a queue is full or empty


Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Work(Generic[P, R]):
    """Callbacks for a step: `load`, `kernel` and `store`.

    `load` runs in the reader thread, `store` in the writer thread.

    `kernel` gets the payloads and stacked tensors on the device, each with one leading dimension.
    Several threads call it, each for its own bucket. It gives results, or `Later` ones, whose
    tensors have come `back`. `held` gives the bytes of a result that waits for earlier ones
    (default: those of its step). `stack` is the number of small steps that a CPU computes at once.
    With `announce`, the reader only calls that, and the computing thread loads: for loads that
    leave their data in the CPU's cache.
    """

    load: Callable[[P], Tensors]
    kernel: Callable[[tuple[P, ...], dict[str, Tensor]], Sequence[R | Later[R]]]
    store: Callable[[P, R], None]
    held: Callable[[R], int] | None = None
    stack: int = 1
    announce: Callable[[P], None] | None = None


def run(
    steps: Iterable[Step[P]],
    work: Work[P, R],
    resources: Resources,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Stream all steps through `work`; results are stored in bucket order. Return notes.

    `progress` gets the number of finished steps. The first error of any thread is raised here;
    NotEnoughMemory if the system refuses memory. A stack that a device has no room for is halved,
    down to one step, which then is computed on the CPU, and noted.

    On return or error no thread is left running, but after an interrupt one may be that is inside
    of a long library call. It ends after that, and changes nothing.
    """
    listed = list(steps)
    most = bound(listed, resources.memory, away=resources.apart)
    found = list(buckets(listed, resources, work.stack))
    parcels = list(_parcels(found, most, resources.workers))
    pipeline = _Pipeline(work, resources, most, progress or (lambda _: None))
    if not resources.on_cpu and parcels:
        pipeline.stage(max(parcel.bytes for parcel in parcels))
    pipeline.run(parcels)
    return tuple(pipeline.notes())


class _Stopped(Exception):
    pass


@dataclass(frozen=True)
class _Parcel(Generic[P]):
    """Consecutive buckets handed from thread to thread at once.

    Each hand-over costs a switch between Python threads.
    """

    number: int
    buckets: tuple[Bucket[P], ...]

    @property
    def bytes(self) -> int:
        """Working memory of all buckets."""
        return sum(bucket.bytes for bucket in self.buckets)


def _parcels(buckets: Sequence[Bucket[P]], room: int, workers: int) -> Iterator[_Parcel[P]]:
    """Cut buckets into parcels, smaller ones towards the end.

    All workers then end together.
    """
    # workers and the parcels read ahead all hold one parcel each
    room = min(PARCEL, room // (workers + BESIDE))
    number = start = 0
    while start < len(buckets):
        end = start + 1
        size, most = buckets[start].bytes, (len(buckets) - start) // (ROUNDS * workers)
        while end < len(buckets) and end - start < most and size + buckets[end].bytes <= room:
            size += buckets[end].bytes
            end += 1
        yield _Parcel(number, tuple(buckets[start:end]))
        number, start = number + 1, end


Host = dict[str, "Tensor"] | Staged | Sent | None  # None: not loaded yet
Results = Sequence[Sequence["R | Later[R]"]]
Loaded = tuple["_Parcel[P]", list[Host], Slab | None]


@dataclass
class _Done(Generic[P, R]):
    """Results of a parcel, where they are, and the bytes that they hold."""

    parcel: _Parcel[P]
    results: Results[R]
    held: int
    slab: Slab | None
    leaving: Leaving


class _Pipeline(Generic[P, R]):
    def __init__(
        self, work: Work[P, R], resources: Resources, most: int, progress: Callable[[int], None]
    ) -> None:
        self.work, self.resources, self.progress = work, resources, progress
        self.lanes = Lanes(resources.device) if resources.on_cpu else lanes_of(resources.device)
        self.threads = max(resources.workers, self.lanes.threads)  # that compute
        self.room = Budget(most, self.threads + BESIDE)
        self.stop = threading.Event()
        self.failure: list[BaseException] = []
        self.loaded: queue.SimpleQueue[Loaded[P] | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[_Done[P, R] | None] = queue.SimpleQueue()
        self.working = self.threads
        self.elsewhere: list[str] = []  # steps that the device had no room for
        self.lock = threading.Lock()
        self.turn = threading.Lock()  # of the readers, so that parcels are admitted in order
        self.ring: Ring | None = None
        self.reading = 1

    def stage(self, size: int) -> None:
        """Let parcels of at most `size` bytes be read into slabs, by several readers."""
        count = max(1, min(IN_FLIGHT, self.room.bytes // size - self.lanes.apart))
        self.ring = Ring(size, count, self.lanes.memory)
        self.reading = min(READERS, count)

    def run(self, todo: Sequence[_Parcel[P]]) -> None:
        bodies: list[tuple[str, Callable[..., None], tuple[object, ...]]]
        left = iter(todo)
        bodies = [(f"read-{n}", self._read, (left,)) for n in range(self.reading)]
        bodies += [("write", self._write, ())]
        bodies += [(f"compute-{n}", self._compute, ()) for n in range(self.threads)]
        threads = [
            threading.Thread(
                target=self._guarded, args=(body, *args), name=f"adaptkit-{name}", daemon=True
            )
            for name, body, args in bodies
        ]
        with short_turns():
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():  # with a timeout, so that Ctrl-C is noticed
                        thread.join(_POLL)
            except KeyboardInterrupt:
                self.stop.set()
                until = time.monotonic() + _PATIENCE
                for thread in threads:
                    thread.join(max(0.0, until - time.monotonic()))
                raise
        if self.failure:
            raise explained(self.failure[0])

    def notes(self) -> Iterator[str]:
        """What was not computed where it was asked for."""
        yield from self.resources.notes
        if self.elsewhere:
            first, more = self.elsewhere[0], len(self.elsewhere) - 1
            what = f"{first} and {more} more" if more else first
            yield f"{what}: computed on the CPU, no room in the memory of {self.resources.device}."

    def _guarded(self, body: Callable[..., None], *args: object) -> None:
        try:
            body(*args)
        except _Stopped:
            pass
        except BaseException as error:
            # BaseException: a worker that dies silently would leave the others waiting
            self.failure.append(error)
            self.stop.set()

    def _get(self, where: queue.SimpleQueue[T]) -> T:
        while True:
            if self.stop.is_set():
                raise _Stopped
            try:
                return where.get(timeout=_POLL)
            except queue.Empty:
                continue

    def _read(self, todo: Iterator[_Parcel[P]]) -> None:
        while (admitted := self._admitted(todo)) is not None:
            parcel, slab = admitted
            self.loaded.put(
                (parcel, [self._ahead(bucket, slab) for bucket in parcel.buckets], slab)
            )
            del admitted, slab
        with self.lock:
            self.reading -= 1
            last = not self.reading
        for _ in range(self.threads if last else 0):
            # one end marker per worker
            self.loaded.put(None)

    def _admitted(self, todo: Iterator[_Parcel[P]]) -> tuple[_Parcel[P], Slab | None] | None:
        """The next parcel, as soon as there is room for it, and where it is read to.

        In order: a slab is free again when its results are stored, behind those of all before.
        """
        with self.turn:
            parcel = next(todo, None)
            if parcel is None:
                return None
            if not self.room.enter(parcel.bytes, self._goes_on):
                raise _Stopped
            return parcel, self._slab()

    def _goes_on(self) -> bool:
        return not self.stop.is_set()

    def _slab(self) -> Slab | None:
        if self.ring is None:
            return None
        slab = self.ring.take(self._goes_on)
        if slab is None:
            raise _Stopped
        return slab

    def _ahead(self, bucket: Bucket[P], slab: Slab | None) -> Host:
        if self.stop.is_set():
            raise _Stopped
        if self.work.announce is None:
            return self._on_its_way(self._load(bucket, slab))
        for payload in bucket.payloads:
            self.work.announce(payload)
        return None

    def _load(self, bucket: Bucket[P], slab: Slab | None = None) -> dict[str, Tensor] | Staged:
        if slab is not None:
            return slab.stack([partial(self.work.load, payload) for payload in bucket.payloads])
        loaded = [self.work.load(payload) for payload in bucket.payloads]
        if len(loaded) == 1:
            return {key: tensor.unsqueeze(0) for key, tensor in loaded[0].items()}
        import torch

        return {key: torch.stack(alike(key, loaded)) for key in loaded[0]}

    def _on_its_way(self, host: dict[str, Tensor] | Staged) -> Host:
        """A stack that is sent, if the device has room for it by now."""
        import torch

        try:
            with torch.inference_mode():
                return self.lanes.send(host)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # what the device has not got is loaded once more by whoever computes
        return None

    def _compute(self) -> None:
        import torch

        if self.resources.on_cpu:
            one_thread_here()
        # every `del` below drops the last reference, so that the memory counted as free is free
        with self.lanes.computing(), torch.inference_mode():
            while (item := self._get(self.loaded)) is not None:
                parcel, host, slab = item
                results: list[Sequence[R | Later[R]]] = []
                del item
                with self.lanes.leaving(slab) as leaving:
                    for n, bucket in enumerate(parcel.buckets):
                        tensors, host[n] = host[n], None
                        results.append(self._computed(bucket, tensors, leaving))
                        leaving.keep()
                        del tensors
                    leaving.close()
                del host
                held = self._held(parcel, results)
                self.room.computed(parcel.bytes, held)
                self.done.put(_Done(parcel, results, held, slab, leaving))
                del results, slab, leaving
        with self.lock:
            self.working -= 1
            if not self.working:
                self.done.put(None)

    def _computed(self, bucket: Bucket[P], host: Host, leaving: Leaving) -> Sequence[R | Later[R]]:
        """The results of a bucket, from its tensors, or from those of half of it at a time."""
        try:
            tensors = self._load(bucket) if host is None else host
            return self.work.kernel(bucket.payloads, self._moved(tensors))
        except Exception as error:
            if self.resources.on_cpu or not out_of_memory(error):
                raise
        # here, not in the handler: the error refers to what its frames hold
        leaving.undo()
        release(self.resources.device)
        if len(bucket.steps) > 1:
            half = len(bucket.steps) // 2
            found: list[R | Later[R]] = []
            for steps in (bucket.steps[:half], bucket.steps[half:]):
                found += self._computed(Bucket(steps), None, leaving)
                leaving.keep()
            return found
        # a device's plan counts what is read and written, and the CPU computes in host memory
        check_memory(bucket.steps, self.resources.memory)
        self.elsewhere += map(_label, bucket.payloads)
        here = self._load(bucket)
        assert not isinstance(here, Staged)
        return self.work.kernel(bucket.payloads, here)

    def _moved(self, tensors: dict[str, Tensor] | Staged | Sent) -> dict[str, Tensor]:
        """A bucket's tensors on the device, each original dropped as it is moved."""
        if self.resources.on_cpu and isinstance(tensors, dict):
            return tensors
        return self.lanes.arrived(tensors)

    def _held(self, parcel: _Parcel[P], results: Results[R]) -> int:
        """Bytes of the results, at least 1.

        `used` = 0 would mean that nothing is admitted.
        """
        held = self.work.held
        if held is None:
            return max(1, parcel.bytes)
        each = (
            result.nbytes if isinstance(result, Later) else held(result)
            for some in results
            for result in some
        )
        return max(1, min(parcel.bytes, sum(each)))

    def _write(self) -> None:
        """Store results in the order of the parcels, not in that of completion."""
        waiting: dict[int, _Done[P, R]] = {}
        following = finished = 0
        while (item := self._get(self.done)) is not None:
            waiting[item.parcel.number] = item
            del item
            while following in waiting:
                done = waiting.pop(following)
                following += 1
                done.leaving.wait()
                for bucket, some in zip(done.parcel.buckets, done.results, strict=True):
                    for payload, result in zip(bucket.payloads, some, strict=True):
                        self.work.store(payload, settled(result))
                        finished += 1
                        self.progress(finished)
                held, slab = done.held, done.slab
                del done, some, result
                if slab is not None and self.ring is not None:
                    self.ring.give(slab)
                self.room.leave(held)


def _label(payload: object) -> str:
    found = getattr(payload, "label", None) or getattr(payload, "name", None)
    return str(found or "a layer")
