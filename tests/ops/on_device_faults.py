"""Each order that the engine relies on is left out once: the emulated streams notice. Run by `test_device.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from adaptkit.staging import lanes
from adaptkit.staging.slabs import Ring
from tests import emulated, emulated_streams
from tests.ops.on_device_streams import Run, source

__all__ = ["source"]  # a fixture


@pytest.fixture
def device() -> Iterator[str]:
    with emulated.emulated() as name:
        yield name


def nothing(*_: Any) -> None:
    pass


FAULTS = {
    "kernels do not wait for what is sent": (emulated_streams.Event, "passed", nothing, "before it is there"),
    "the sender does not know who reads": (emulated.OnDevice, "record_stream", nothing, "without `record_stream`"),
    "copies back do not wait for kernels": (lanes._Outward, "_follow", nothing, "does not wait"),
    "the writer does not wait": (lanes._Outward, "wait", nothing, "still to be made"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_order_that_is_left_out_is_noticed(fault: str, source: Any, device: str) -> None:
    where, name, instead, message = FAULTS[fault]
    with (
        mock.patch.object(where, name, instead),
        pytest.raises(RuntimeError, match=message),
    ):
        Run(source, device)()


def test_results_read_before_they_are_there_are_wrong(source: Any, device: str) -> None:
    """What the emulated streams cannot see, the numbers show."""
    with (
        mock.patch.object(lanes._Outward, "wait", nothing),
        mock.patch.object(Ring, "give", nothing),
    ):
        one = Run(source, device, 10**9)
        one()
    assert not one.right
    assert all(bool(found.isnan().all()) for found in one.stored.values())


def test_a_slab_given_back_by_the_thread_that_computes_is_noticed(source: Any, device: str) -> None:
    rings: list[Ring] = []
    init, close = Ring.__init__, lanes._Outward.close

    def made(ring: Ring, *args: Any) -> None:
        init(ring, *args)
        rings.append(ring)

    def closed(leaving: Any) -> None:
        close(leaving)
        rings[0].give(leaving.slab)

    with (
        mock.patch.object(Ring, "__init__", made),
        mock.patch.object(lanes._Outward, "close", closed),
        pytest.raises(RuntimeError, match="still to be made"),
    ):
        Run(source, device)()
