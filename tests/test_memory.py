"""Large blocks: of any content, used again by the thread that had them, never while anything refers to them."""

from __future__ import annotations

import gc
import mmap
import threading

import pytest
import torch

from adaptkit import memory
from adaptkit.linalg.precision import empty

LARGE = 2 * memory.HUGE
pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system"
)


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    memory.forget()


def block(size: int) -> torch.Tensor:
    return empty((size // 4,), torch.float32, torch.device("cpu"))


def test_small_needs_are_left_to_the_allocator() -> None:
    assert memory.huge(memory.HUGE - 1) is None
    assert block(1000).numel() == 250


def test_a_free_block_of_about_the_size_is_used_again() -> None:
    first = block(LARGE)
    place = first.data_ptr()
    del first
    assert block(LARGE - 4096).data_ptr() == place
    assert block(LARGE // 2).data_ptr() == place
    second = block(LARGE)
    assert second.data_ptr() == place
    second.fill_(1.0)  # all of it is ours to write


def test_a_block_in_use_is_never_given_out() -> None:
    first = block(LARGE)
    view = first[10:20]
    place = first.data_ptr()
    del first
    others = [block(LARGE) for _ in range(3)]
    assert len({other.data_ptr() for other in others} | {place}) == 4
    view.fill_(7.0)
    for other in others:
        other.fill_(1.0)
    assert view.tolist() == [7.0] * 10


def test_free_blocks_of_other_sizes_go_back_before_a_new_one_comes() -> None:
    first, second = block(LARGE), block(8 * LARGE)
    del first, second
    assert len(memory._own.views) == 2
    third = block(3 * LARGE)
    assert [len(view) for view in memory._own.views] == [3 * LARGE]
    fourth = block(LARGE)
    assert len(memory._own.views) == 2
    del third, fourth
    memory.forget()
    assert not memory._own.views


def test_a_block_outlives_the_thread_and_the_list_that_knew_it() -> None:
    made: list[torch.Tensor] = []

    def make() -> None:
        made.append(block(LARGE).fill_(3.0))
        memory.forget()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    gc.collect()
    assert not memory._own.views, "each thread has its own"
    other = block(LARGE).fill_(5.0)
    assert float(made[0].min()) == float(made[0].max()) == 3.0
    assert float(other[0]) == 5.0


def test_systems_without_huge_pages_allocate_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert memory.huge(LARGE) is None
    assert block(LARGE).numel() == LARGE // 4
