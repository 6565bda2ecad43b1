"""`record`: a dataclass from its first instance on."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, fields

import pytest

from adaptkit.algorithms import _record
from adaptkit.algorithms._record import record
from tests.synth import FIXTURES


@record
class First:
    one: int


@record
class Second(First):
    two: int = 2


def test_a_class_is_a_frozen_dataclass_from_its_first_instance_on() -> None:
    assert {First, Second} <= _record._pending
    made = Second(1)
    assert {First, Second}.isdisjoint(_record._pending)
    assert (made.one, made.two, First(3).one) == (1, 2, 3)
    assert [field.name for field in fields(made)] == ["one", "two"]  # type: ignore[arg-type]
    assert made != Second(1)
    with pytest.raises(FrozenInstanceError):
        made.one = 2  # type: ignore[misc]


def test_threads_that_make_the_first_instances_at_once() -> None:
    for _ in range(50):
        kind = record(type("Kind", (), {"__annotations__": {"one": "int"}}))
        found: list[int] = []
        start = threading.Barrier(4)

        def make(
            kind: type = kind, found: list[int] = found, start: threading.Barrier = start
        ) -> None:
            start.wait()
            found.append(kind(7).one)

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [7] * 4


def test_reading_a_header_makes_none() -> None:
    code = (
        "from adaptkit.adapter import Adapter\nfrom adaptkit.algorithms import _record\n"
        f"Adapter.open({str(FIXTURES / 'tiny' / 'lora-kohya.safetensors')!r})\n"
        "print(len(_record._pending), len(_record._complete))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pending, complete = map(int, done.stdout.split())
    assert pending > 40
    assert not complete
