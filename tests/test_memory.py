"""Large blocks come back to be used again, and never while somebody holds them."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from adaptkit import memory
from adaptkit.linalg.precision import empty

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    if memory.huge(memory.HUGE) is None:
        pytest.skip("no huge pages here")
    gc.collect()
    monkeypatch.setattr(memory, "_idle", memory._Idle())


def filled(value: int, size: int = memory.HUGE) -> torch.Tensor:
    return torch.frombuffer(memory.huge(size), dtype=torch.uint8).fill_(value)


def test_a_block_is_used_again_when_nobody_holds_it() -> None:
    one = filled(1)
    place = one.data_ptr()
    part = one[5:9]
    del one
    assert memory._idle.bytes() == 0, "a view still holds it"
    other = filled(2)
    assert other.data_ptr() != place
    assert part.tolist() == [1, 1, 1, 1]
    del part
    assert memory._idle.bytes() == memory.HUGE
    assert filled(3, memory.HUGE).data_ptr() == place


def test_a_block_that_is_much_larger_is_left() -> None:
    large = filled(1, 4 * memory.HUGE)
    place = large.data_ptr()
    del large
    assert filled(2).data_ptr() != place
    assert memory.huge(memory.HUGE - 1) is None


def test_no_more_than_the_bound_is_kept() -> None:
    blocks = [filled(n, memory.IDLE // 2) for n in range(4)]
    del blocks
    assert 0 < memory._idle.bytes() <= memory.IDLE


def test_threads_never_share_a_block() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            tensor = empty((memory.HUGE // 4 + number,), torch.float32, CPU).fill_(number)
            if not bool((tensor[:: 1 << 16] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
