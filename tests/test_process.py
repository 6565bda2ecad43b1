"""Large blocks, threads and turns: the process is as it was afterwards, whoever else uses it."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from adaptkit import process
from adaptkit.engine import Resources, Step, Work, run
from adaptkit.linalg.precision import empty

LARGE = 2 * process.HUGE


def block(size: int) -> torch.Tensor:
    return empty((size // 4,), torch.float32, torch.device("cpu"))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_large_blocks_are_apart_and_outlive_who_made_them() -> None:
    assert process.huge(process.HUGE - 1) is None
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.append(block(LARGE).fill_(3.0)))
    thread.start()
    thread.join()
    other = block(LARGE).fill_(5.0)
    assert float(made[0].min()) == float(made[0].max()) == 3.0
    assert float(other[0]) == 5.0
    assert len(process.huge(LARGE) or b"") == LARGE


def test_systems_without_huge_pages_allocate_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert process.huge(LARGE) is None
    assert block(LARGE).numel() == LARGE // 4


def test_turns_are_short_until_the_last_run_ends() -> None:
    before = sys.getswitchinterval()
    first, second = process.short_turns(), process.short_turns()
    with first:
        second.__enter__()
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() < before
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_turns_that_the_program_sets_meanwhile_stay() -> None:
    before = sys.getswitchinterval()
    with process.short_turns():
        sys.setswitchinterval(0.02)
    assert sys.getswitchinterval() == pytest.approx(0.02)
    sys.setswitchinterval(before)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_two_runs_at_once_leave_the_process_as_it_was() -> None:
    """Each has the workers that it would have alone; a third starts while they run."""
    turns, inside, workers = sys.getswitchinterval(), set[int](), list[int]()
    both, over = threading.Barrier(2, timeout=30), threading.Event()

    def go(last: bool) -> None:
        resources = Resources.choose("cpu")
        workers.append(resources.workers)

        def kernel(payloads: tuple[int, ...], _: object) -> list[int]:
            inside.add(torch.get_num_threads())
            if payloads[0] == 0:
                both.wait()
                assert not last or over.wait(30)
            return [0]

        run([Step(0, (), 10)], Work(lambda _: {}, kernel, lambda *_: None), resources)
        over.set()

    threads = [threading.Thread(target=go, args=(last,)) for last in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen: list[int] = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert workers == [3, 3]
    assert inside == {1}
    assert seen == [3]
    assert torch.get_num_threads() == 3
    assert sys.getswitchinterval() == turns
