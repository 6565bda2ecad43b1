"""Where work is computed, and how much of it at once: the host's memory and a device's bound apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from adaptkit import process, steps
from adaptkit.errors import NotEnoughMemory
from adaptkit.linalg import precision
from adaptkit.ops import advise, combine, compare, convert, extract, merge, resize
from adaptkit.steps import IN_FLIGHT, SHARE, Resources, Step, buckets, peak_memory
from tests import made
from tests.ops.merge.test_verify import base_file

FREE = 1_000_000


@pytest.fixture
def cuda() -> Iterator[None]:
    """A CUDA device with `FREE` bytes, as far as it is asked before anything is computed."""
    told = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda _: (FREE, 8 * FREE))
    with mock.patch.object(torch, "cuda", told), mock.patch.object(torch, "empty"):
        yield


@pytest.mark.usefixtures("cuda")
def test_auto_takes_a_gpu_only_for_work_that_gains() -> None:
    assert Resources.choose("auto", gains=True) == Resources("cuda", room=int(SHARE * FREE))
    assert Resources.choose("auto", gains=False).device == "cpu"
    # who asks for it by name gets it
    assert Resources.choose("cuda:0", gains=False).device == "cuda:0"


@pytest.mark.parametrize(
    ("op", "gains"),
    [(extract, True), (advise, True), *((op, False) for op in (merge, resize, combine, convert, compare))],
)  # fmt: skip
def test_what_each_verb_asks_for(op: Any, gains: bool, tmp_path: Path) -> None:
    """Extraction and advice factorize whole differences; all others are bound by files or by float64."""
    base, lora = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    out = tmp_path / "o.safetensors"
    tuned = merge.Options(output=tmp_path / "t.safetensors", family="sd1", device="cpu")
    merge.run(merge.plan(base, [(lora, 0.1)], tuned))
    pair = (base, tuned.output)
    inputs = {
        "extract": pair, "advise": pair, "merge": (base, [(lora, 1.0)]), "resize": (lora,), "convert": (lora,),
        "combine": ([(lora, 1.0), (lora, 0.5)],), "compare": ((lora, 1.0), (lora, 0.5)),
    }  # fmt: skip
    options = {
        "extract": {"rank": 1, "family": "sd1", "output": out}, "advise": {"family": "sd1"}, "merge": {"output": out, "family": "sd1"},
        "resize": {"rank": 1, "output": out}, "convert": {"to": "kohya", "algo": "full", "output": out},
        "combine": {"output": out}, "compare": {},
    }  # fmt: skip
    name = op.__name__.rpartition(".")[2]
    asked = []

    def choose(device: str = "auto", memory: int | None = None, **wants: bool) -> Resources:
        asked.append((device, wants.get("gains", True)))
        return Resources()

    with mock.patch.object(Resources, "choose", choose):
        op.run(op.plan(*inputs[name], op.Options(**options[name])))
    assert set(asked) == {("auto", gains)}


@pytest.mark.usefixtures("cuda")
def test_wide_work_leaves_a_device_without_float64() -> None:
    with mock.patch.object(precision, "NARROW", frozenset({"cuda"})):
        found = Resources.choose("cuda")
        assert (found.device, found.room) == ("cpu", None)
        assert found.notes == ("Computed on the CPU: cuda has no float64 and no decompositions.",)
        assert Resources.choose("cuda", wide=False).device == "cuda"
    assert Resources.choose("cuda").notes == ()


@pytest.mark.parametrize(("memory", "most"), [(10_000, 4), (240, 2), (90, 1)])
def test_stacks_fit_the_device_and_what_is_staged_the_host(memory: int, most: int) -> None:
    """Steps of 100 bytes on the device, 30 on the host; 400 bytes of device memory."""
    listed = [Step(n, "same", 100, (n, 0), 30) for n in range(9)]
    found = list(buckets(listed, Resources("cuda", memory, room=400)))
    assert max(len(bucket.steps) for bucket in found) == most
    assert all(100 * len(bucket.steps) <= 400 for bucket in found)
    assert all(bucket.bytes <= max(30, memory // IN_FLIGHT) for bucket in found)
    assert [step.payload for bucket in found for step in bucket.steps] == list(range(9))


def test_without_the_devices_word_the_bound_holds_for_both() -> None:
    listed = [Step(n, "same", 100, (n, 0), 30) for n in range(9)]
    found = list(buckets(listed, Resources("mps", 800)))
    assert [len(bucket.steps) for bucket in found] == [2, 2, 2, 2, 1]
    assert found[0].bytes == 200


def test_a_layer_that_the_host_cannot_hold_is_refused() -> None:
    assert len(list(buckets([Step(0, (), 500, (0, 0), 50)], Resources("cuda", 60, room=1000)))) == 1
    with pytest.raises(NotEnoughMemory, match="0.0 MB"):
        list(buckets([Step(0, (), 500, (0, 0), 70)], Resources("cuda", 60, room=1000)))
    assert peak_memory([Step(0, (), 500, (0, 0), 50)]) == 500


@pytest.mark.parametrize(
    ("cores", "free", "expected"),
    [
        (1, 64_000, 560),
        (2, 64_000, 560),
        (16, 64_000, 4480),
        (16, 8_000, 2000),
        (16, 1_000, 560),
        (16, None, 560),
    ],
)
def test_the_default_bound_follows_the_machine(
    cores: int, free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MB; never below what two cores have."""
    monkeypatch.setattr(steps, "cores", lambda: cores)
    monkeypatch.setattr(steps, "free_memory", lambda: free and free * 10**6)
    assert steps.default_memory.__wrapped__() == expected * 10**6


def test_what_is_free_is_asked_of_the_system() -> None:
    free = process.free_memory()
    assert free is None or 1e6 < free < 1e14
    if sys.platform in ("linux", "win32", "darwin"):
        assert free is not None
    assert 1 <= process.cores() <= (os.cpu_count() or 1)
