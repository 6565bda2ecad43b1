"""Copies to a device and back on streams of their own: what is stored is right, and nothing is read or used again too early.

Run by `test_device.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from adaptkit.engine import Resources, Work, run
from adaptkit.files.open import open_source
from adaptkit.linalg.hosted import fetched, on_host
from adaptkit.staging import lanes
from adaptkit.staging.lanes import Later, back
from adaptkit.staging.slabs import Ring
from adaptkit.steps import IN_FLIGHT, Step
from tests import emulated, emulated_streams

LAYERS, SIDE, MEMBERS = 24, 8, 3
SIZE = 3 * 4 * SIDE * SIDE  # of a step: what is read, and what it becomes


@pytest.fixture
def device() -> Iterator[str]:
    if torch.cuda.is_available():
        yield "cuda:0"
    else:
        with emulated.emulated() as name:
            yield name


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Any]:
    draw = torch.Generator().manual_seed(0)
    state = {str(n): torch.randn(SIDE, SIDE, generator=draw) for n in range(LAYERS)}
    save_file(state, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as found:
        yield found


class Run:
    """Each layer doubled, and its square; stored as they come, or made later."""

    def __init__(self, source: Any, device: str, memory: int = IN_FLIGHT * MEMBERS * SIZE) -> None:
        self.source, self.device, self.memory = source, device, memory
        self.stored: dict[int, torch.Tensor] = {}
        self.sizes: list[int] = []
        self.lock = threading.Lock()
        self.inside = self.most = 0
        self.refuse = 10**9  # members that the device has no room for

    def load(self, n: int) -> dict[str, torch.Tensor]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        return {"x": self.source.read(str(n))}

    def kernel(self, numbers: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> list[Any]:
        x = tensors.pop("x")
        twice = back(2 * x)
        self.sizes.append(len(x))
        if x.device.type != "cpu" and len(x) >= self.refuse:
            raise RuntimeError("out of memory")
        square = back(x @ x)
        return [Later(lambda n=n: torch.cat([twice[n], square[n]]), SIZE) for n in range(len(x))]

    def store(self, n: int, found: torch.Tensor) -> None:
        self.stored[n] = found.clone()
        with self.lock:
            self.inside -= 1

    def __call__(self) -> tuple[str, ...]:
        steps = [Step(n, "same", SIZE, (n, 0)) for n in range(LAYERS)]
        work = Work(self.load, self.kernel, self.store)
        return run(steps, work, Resources(self.device, self.memory, room=10**9))

    @property
    def right(self) -> bool:
        made = {n: self.source.read(str(n)) for n in range(LAYERS)}
        return list(self.stored) == list(range(LAYERS)) and all(
            torch.allclose(found, torch.cat([2 * made[n], made[n] @ made[n]]), atol=1e-4)
            for n, found in self.stored.items()
        )


def test_results_are_right_and_only_the_writer_waits(source: Any, device: str) -> None:
    waited: list[str] = []

    def synchronize(event: Any) -> None:
        waited.append(threading.current_thread().name)
        event.passed()

    one = Run(source, device)
    with mock.patch.object(emulated_streams.Event, "synchronize", synchronize):
        assert one() == ()
    assert one.right
    assert set(one.sizes) == {MEMBERS}
    # a fourth stack is read while three are on their way
    assert MEMBERS < one.most <= IN_FLIGHT * MEMBERS
    if not torch.cuda.is_available():
        assert set(waited) == {"adaptkit-write"}


@pytest.mark.parametrize("refuse", [3, 2, 1])
def test_a_stack_without_room_leaves_no_slab_behind(refuse: int, source: Any, device: str) -> None:
    """Half of its results are on their way back when the device has no more room."""
    rings: list[Ring] = []
    init = Ring.__init__

    def made(ring: Ring, *args: Any) -> None:
        init(ring, *args)
        rings.append(ring)

    one = Run(source, device)
    one.refuse = refuse
    with mock.patch.object(Ring, "__init__", made):
        notes = one()
    assert one.right
    assert len(notes) == (refuse == 1)
    assert all(slab.used == 0 for slab in rings[0].free)
    assert len(rings[0].free) + rings[0].left == IN_FLIGHT


def test_runs_that_overlap(source: Any, device: str) -> None:
    runs = [Run(source, device, memory) for memory in (IN_FLIGHT * SIZE, 2 * SIZE)]
    threads = [threading.Thread(target=one) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one.right for one in runs)


def test_the_next_stack_is_computed_while_the_host_solves_what_is_small(
    source: Any, device: str
) -> None:
    """The host's part of the first stack ends only when the second one is computed: at most two are, and in order."""
    second = threading.Event()
    inside: list[int] = []
    most: list[int] = []

    class Solving(Run):
        def kernel(self, numbers: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> list[Any]:
            inside.append(numbers[0])
            most.append(len(inside))
            (gram,) = fetched(tensors["x"].mT @ tensors["x"])
            if numbers[0] == 0:
                assert all(on_host(lambda _: second.wait(60), gram))
            elif numbers[0] == MEMBERS:
                second.set()
            found = super().kernel(numbers, tensors)
            inside.remove(numbers[0])
            return found

    one = Solving(source, device)
    one()
    assert one.right
    assert max(most) == lanes.THREADS
