from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from adaptkit import engine
from adaptkit.engine import Work, run
from adaptkit.errors import AdaptkitError, NotEnoughMemory
from adaptkit.process import torch_threads
from adaptkit.steps import Resources, Step, buckets


def steps(n: int, size: int = 10) -> list[Step[int]]:
    return [Step(i, (i % 3,), size, (0, n - i)) for i in range(n)]


def doubling(stored: list[tuple[int, float]]) -> Work[int, Tensor]:
    return Work(
        load=lambda i: {"x": torch.full((2, 2), float(i))},
        kernel=lambda payloads, tensors: list(2 * tensors["x"]),
        store=lambda i, result: stored.append((i, float(result[0, 0]))),
    )


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))


def test_all_steps_are_done_in_file_order() -> None:
    stored: list[tuple[int, float]] = []
    seen: list[int] = []
    run(steps(20), doubling(stored), Resources(), seen.append)
    assert stored == [(i, 2.0 * i) for i in reversed(range(20))]
    assert seen == list(range(1, 21))


@pytest.mark.parametrize("most", [1, 4])
def test_a_cpu_stacks_a_few_that_are_light_and_near(most: int) -> None:
    listed = [
        Step(i, i % 3 if i < 60 else i, 1 + 5_000_000 * (i % 3 == 1), (0, i)) for i in range(80)
    ]
    found = list(buckets(listed, Resources(), most))
    assert sorted(p for bucket in found for p in bucket.payloads) == list(range(80))
    assert [bucket.payloads[0] for bucket in found] == sorted(
        bucket.payloads[0] for bucket in found
    )
    for bucket in found:
        assert len({step.shape for step in bucket.steps}) == 1
        assert len(bucket.steps) <= most
        assert bucket.bytes <= engine.PARCEL
        assert bucket.payloads[-1] - bucket.payloads[0] < engine.NEAR
    if most > 1:
        sizes = {
            bucket.payloads[0] % 3: len(bucket.steps) for bucket in found if bucket.payloads[0] < 40
        }
        assert sizes == {0: 4, 1: 3, 2: 4}, "three of five megabytes are all that is light"


@pytest.mark.parametrize(("workers", "most"), [(1, 16), (2, 8), (8, 2), (64, 1)])
def test_every_worker_gets_stacks(workers: int, most: int) -> None:
    listed = [Step(i, (), 10, (0, i)) for i in range(64)]
    found = list(buckets(listed, Resources(workers=workers), 16))
    assert {len(bucket.steps) for bucket in found} == {most}
    assert len(found) >= min(64, engine.ROUNDS * workers)


def test_a_stack_keeps_to_the_memory_bound() -> None:
    listed = [Step(i, (), 10, (0, i)) for i in range(8)]
    assert all(bucket.bytes <= 20 for bucket in buckets(listed, Resources(memory=60), 4))


@pytest.mark.usefixtures("stacked")
def test_equal_shapes_are_stacked_up_to_the_bound() -> None:
    found = list(buckets(steps(20), Resources(memory=120)))
    assert all(len({step.shape for step in bucket.steps}) == 1 for bucket in found)
    assert max(len(bucket.steps) for bucket in found) == 3  # a quarter of the bound, ten bytes each
    stored: list[tuple[int, float]] = []
    run(steps(20), doubling(stored), Resources(memory=120))
    assert sorted(stored) == [(i, 2.0 * i) for i in range(20)]


def test_a_step_beyond_the_bound_is_refused_with_the_figure() -> None:
    with pytest.raises(NotEnoughMemory, match="50.0 MB") as caught:
        run([Step(0, (), 50_000_000)], doubling([]), Resources(memory=10_000_000))
    assert "--memory" in caught.value.hint


@pytest.mark.parametrize("where", ["load", "kernel", "store"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_any_thread_ends_the_run(
    where: str, error: type[BaseException], workers: int
) -> None:
    def fail(*_: object) -> None:
        raise error("here")

    work = doubling([])
    broken = Work(
        **{**{name: getattr(work, name) for name in ("load", "kernel", "store")}, where: fail}
    )
    before = threading.active_count()
    with pytest.raises(error, match="here"):
        run(steps(50), broken, Resources(workers=workers))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_small_steps_go_from_thread_to_thread_together(workers: int) -> None:
    """In order, none twice; never more than a share of what is left, so that no worker waits for another at the end."""
    listed = list(buckets(steps(200), Resources()))
    parcels = list(engine._parcels(listed, engine.DEFAULT_MEMORY, workers))
    assert [bucket for parcel in parcels for bucket in parcel.buckets] == listed
    assert [parcel.number for parcel in parcels] == list(range(len(parcels)))
    counts = [len(parcel.buckets) for parcel in parcels]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (200 // (engine.ROUNDS * workers), 1)
    for memory in (90, 40):  # every worker, and what is read ahead, within the bound
        bounded = engine._parcels(listed, memory, workers)
        assert max(parcel.bytes for parcel in bounded) <= max(
            10, memory // (workers + engine.BESIDE)
        )


def test_turns_are_short_only_while_it_runs() -> None:
    before, seen = sys.getswitchinterval(), list[float]()
    run(steps(3), doubling([]), Resources(), lambda _: seen.append(sys.getswitchinterval()))
    assert max(seen) < before == sys.getswitchinterval()


@pytest.mark.parametrize(
    ("workers", "memory", "most"), [(1, None, 3), (3, None, 5), (3, 25, 2), (3, 5, 1)]
)
def test_what_is_alive_stays_within_the_bound(workers: int, memory: int | None, most: int) -> None:
    """Two read ahead and one for each worker, and from reading to storing never more bytes than the bound."""
    alive, seen, lock = 0, 0, threading.Lock()

    def load(i: int) -> dict[str, Tensor]:
        nonlocal alive, seen
        with lock:
            alive += 1
            seen = max(seen, alive)
        return {"x": torch.zeros(1)}

    def leave() -> None:
        nonlocal alive
        time.sleep(0.002)
        with lock:
            alive -= 1

    def kernel(payloads: tuple[int, ...], tensors: dict[str, Tensor]) -> list[Tensor]:
        if memory is None:
            leave()
        return [tensors["x"]]

    def store(i: int, result: Tensor) -> None:
        if memory is not None:
            leave()

    size = {None: engine.PARCEL, 5: 5}.get(memory, 10)
    run(steps(40, size), Work(load, kernel, store), Resources(memory=memory, workers=workers))
    assert seen == most


def test_a_slow_step_keeps_nobody_waiting() -> None:
    """Results that are ready wait for it as small as they are, and are stored in order all the same."""
    others = threading.Semaphore(0)
    stored: list[int] = []

    def kernel(payloads: tuple[int, ...], tensors: dict[str, Tensor]) -> list[int]:
        if payloads[0] == 29:  # the first on disk
            assert all(others.acquire(timeout=20) for _ in range(25))
        others.release()
        return [1]

    work = Work(
        lambda i: {"x": torch.zeros(1)}, kernel, lambda i, _: stored.append(i), held=lambda n: n
    )
    run(steps(30, 10), work, Resources(memory=60, workers=2))
    assert stored == list(reversed(range(30)))


def test_workers_compute_at_once_and_results_are_stored_in_order() -> None:
    met = threading.Barrier(3, timeout=20)
    stored: list[int] = []
    threads: set[int] = set()

    def kernel(payloads: tuple[int, ...], tensors: dict[str, Tensor]) -> list[Tensor]:
        met.wait()
        threads.add(torch.get_num_threads())
        time.sleep(0.02 * (payloads[0] % 3))
        return [tensors["x"]]

    work = Work(lambda i: {"x": torch.zeros(1)}, kernel, lambda i, _: stored.append(i))
    run(steps(30), work, Resources(workers=3))
    assert stored == list(reversed(range(30)))
    assert threads == {1}


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Another number than the one that the suite, and every worker, sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    """What torch gives a thread that asks for the first time: the number of the whole process."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_torch_has_its_threads_again_afterwards(fails: bool) -> None:
    inside: set[tuple[int, int]] = set()

    def kernel(payloads: tuple[int, ...], tensors: dict[str, Tensor]) -> list[Tensor]:
        inside.add((torch.get_num_threads(), threads_of_a_new_thread()))
        if fails:
            raise ValueError("here")
        return [tensors["x"]]

    work = Work(lambda i: {"x": torch.zeros(1)}, kernel, lambda *_: None)
    assert threads_of_a_new_thread() == 3
    with pytest.raises(ValueError, match="here") if fails else nullcontext():
        run(steps(6), work, Resources(workers=2))
    assert inside == {(1, 3)}, "one in a worker, as ever in any other thread"
    assert threads_of_a_new_thread() == 3
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_announced_steps_are_loaded_by_whoever_computes_them(workers: int) -> None:
    announced: list[int] = []
    loaders: dict[int, str] = {}
    stored: list[tuple[int, float]] = []
    plain = doubling(stored)

    def load(i: int) -> dict[str, Tensor]:
        loaders[i] = threading.current_thread().name
        assert i in announced
        return dict(plain.load(i))

    run(
        steps(40),
        Work(load, plain.kernel, plain.store, announce=announced.append),
        Resources(workers=workers),
    )
    assert announced == list(reversed(range(40)))
    assert stored == [(i, 2.0 * i) for i in reversed(range(40))]
    assert all(name.startswith("adaptkit-compute") for name in loaders.values())


@pytest.mark.parametrize("where", ["load", "announce"])
def test_an_error_of_an_announced_step_ends_the_run(where: str) -> None:
    def fail(_: int) -> None:
        raise ValueError("here")

    work = doubling([])
    found = {"load": work.load, "announce": lambda _: None, where: fail}
    with pytest.raises(ValueError, match="here"):
        run(
            steps(10),
            Work(found["load"], work.kernel, work.store, announce=found["announce"]),
            Resources(),
        )  # type: ignore[arg-type]


def test_the_default_bound_grows_with_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptkit.steps.default_memory", lambda: engine.DEFAULT_MEMORY)
    big = Step(0, (), 3 * engine.DEFAULT_MEMORY)
    assert engine.bound([big], None) == big.bytes
    assert engine.bound(steps(3), None) == engine.DEFAULT_MEMORY
    assert engine.bound([big], 5) == 5
    assert engine.peak_memory(steps(3)) == 30
    assert engine.peak_memory([big, big]) == big.bytes


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_machine_without_cuda_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AdaptkitError, match="no CUDA device") as caught:
        Resources.choose(device)
    assert caught.value.hint == "use --device cpu"
    assert Resources.choose("auto").device == "cpu"


@pytest.mark.usefixtures("three_threads")
def test_a_cpu_has_as_many_workers_as_torch_has_threads() -> None:
    chosen = Resources.choose("cpu", 123)
    assert (chosen.device, chosen.memory, chosen.workers, chosen.on_cpu) == ("cpu", 123, 3, True)
    assert not Resources("cuda:1").on_cpu
    assert Resources("cpu:0").on_cpu


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(AdaptkitError, match="cannot be used"):
        Resources.choose("quantum")


@pytest.mark.gpu
def test_cuda_gives_the_same_numbers() -> None:
    one: list[tuple[int, float]] = []
    two: list[tuple[int, float]] = []
    run(steps(20), doubling(one), Resources("cpu"))
    run(steps(20), doubling(two), Resources("cuda"))
    assert sorted(one) == sorted(two)
