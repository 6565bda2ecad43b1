from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from adaptkit import engine
from adaptkit.engine import Resources, Step, Work, buckets, run
from adaptkit.errors import AdaptkitError, NotEnoughMemory


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


@pytest.mark.usefixtures("stacked")
def test_equal_shapes_are_stacked_up_to_the_bound() -> None:
    found = list(buckets(steps(20), Resources(memory=90)))
    assert all(len({step.shape for step in bucket.steps}) == 1 for bucket in found)
    assert max(len(bucket.steps) for bucket in found) == 3  # a third of the bound, ten bytes each
    stored: list[tuple[int, float]] = []
    run(steps(20), doubling(stored), Resources(memory=90))
    assert sorted(stored) == [(i, 2.0 * i) for i in range(20)]


def test_a_step_beyond_the_bound_is_refused_with_the_figure() -> None:
    with pytest.raises(NotEnoughMemory, match="50.0 MB") as caught:
        run([Step(0, (), 50_000_000)], doubling([]), Resources(memory=10_000_000))
    assert "--memory" in caught.value.hint


@pytest.mark.parametrize("where", ["load", "kernel", "store"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_any_thread_ends_the_run(where: str, error: type[BaseException]) -> None:
    def fail(*_: object) -> None:
        raise error("here")

    work = doubling([])
    broken = Work(**{**{name: getattr(work, name) for name in ("load", "kernel", "store")}, where: fail})
    before = threading.active_count()
    with pytest.raises(error, match="here"):
        run(steps(50), broken, Resources())
    assert threading.active_count() == before


def test_no_more_than_three_buckets_are_alive() -> None:
    """One being read or waiting, one computed, one written or waiting: peak memory is a number, not a hope."""
    alive, most, lock = 0, 0, threading.Lock()

    def load(i: int) -> dict[str, Tensor]:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return {"x": torch.zeros(1)}

    def store(i: int, result: Tensor) -> None:
        nonlocal alive
        time.sleep(0.002)
        with lock:
            alive -= 1

    run(steps(40), Work(load, lambda payloads, tensors: [tensors["x"]], store), Resources())
    assert most == engine.ALIVE


def test_unknown_devices_are_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(AdaptkitError, match="CUDA"):
            Resources.choose("cuda")
    with pytest.raises(AdaptkitError, match="cannot be used"):
        Resources.choose("quantum")
    assert Resources.choose("cpu", 123).memory == 123


@pytest.mark.gpu
def test_cuda_gives_the_same_numbers() -> None:
    one: list[tuple[int, float]] = []
    two: list[tuple[int, float]] = []
    run(steps(20), doubling(one), Resources("cpu"))
    run(steps(20), doubling(two), Resources("cuda"))
    assert sorted(one) == sorted(two)
