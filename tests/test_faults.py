"""Memory that is refused, a full disk, Ctrl-C: one clear error, nothing left behind, or the work done all the same."""

from __future__ import annotations

import _thread
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptkit.engine import Work, run
from adaptkit.errors import CannotWrite, NotEnoughMemory
from adaptkit.files import output_file
from adaptkit.ops import merge
from adaptkit.steps import Resources, Step

DEVICE = "meta"  # tensors go there on every machine, and hold nothing
REFUSED = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.17 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


class Device:
    """Work whose kernel finds room for `room` members of a stack on the device."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room, self.error = room, error
        self.sizes: list[tuple[str, int]] = []
        self.stored: list[tuple[int, int]] = []

    def kernel(self, payloads: tuple[int, ...], tensors: dict[str, Tensor]) -> list[int]:
        x = tensors.pop("x")  # as kernels do, to free it early
        self.sizes.append((x.device.type, len(payloads)))
        if x.device.type == DEVICE and len(x) > self.room:
            raise self.error
        return [10 * i for i in payloads]

    def run(self, device: str = DEVICE) -> tuple[str, ...]:
        steps = [Step(i, "same", 10, (0, i)) for i in range(8)]
        work = Work(
            lambda i: {"x": torch.full((2,), float(i))},
            self.kernel,
            lambda i, found: self.stored.append((i, found)),
        )
        return run(steps, work, Resources(device))


@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_a_stack_without_room_is_halved(error: BaseException) -> None:
    device = Device(2, error)
    assert device.run() == ()
    assert device.stored == [(i, 10 * i) for i in range(8)]
    assert device.sizes == [(DEVICE, n) for n in (8, 4, 2, 2, 4, 2, 2)]


def test_a_layer_without_room_is_computed_on_the_cpu_and_noted() -> None:
    device = Device(0, REFUSED[0])
    (note,) = device.run()
    assert device.stored == [(i, 10 * i) for i in range(8)]
    assert [size for size in device.sizes if size[0] == "cpu"] == [("cpu", 1)] * 8
    assert "7 more" in note
    assert "CPU" in note


def test_no_other_error_is_taken_for_a_lack_of_room() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        Device(4, RuntimeError("mat1 and mat2 shapes cannot be multiplied")).run()


@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_memory_that_the_system_refuses_is_no_bug(error: BaseException) -> None:
    def refuse(*_: object) -> Any:
        raise error

    work = Work(lambda _: {"x": torch.zeros(1)}, refuse, lambda *_: None)
    with pytest.raises(NotEnoughMemory) as caught:
        run([Step(0, (), 10)], work, Resources())
    assert "--memory" in (caught.value.hint or "")


def test_a_stack_of_unlike_tensors_is_refused() -> None:
    """torch would make one dtype of them without a word."""
    work = Work(
        lambda i: {"x": torch.zeros(2, dtype=(torch.float16, torch.bfloat16)[i])},
        lambda payloads, _: list(payloads),
        lambda *_: None,
    )
    with pytest.raises(RuntimeError, match="'x' differs"):
        run([Step(i, "same", 10) for i in range(2)], work, Resources(DEVICE))


def test_an_interrupt_does_not_wait_for_a_long_call() -> None:
    """As an exact SVD of a large layer, which nothing ends before it is done."""
    inside, over = threading.Event(), threading.Event()

    def kernel(*_: object) -> list[int]:
        inside.set()
        over.wait(30)
        return [0]

    def interrupt() -> None:
        inside.wait(30)
        _thread.interrupt_main()

    work = Work(lambda _: {"x": torch.zeros(1)}, kernel, lambda *_: None)
    threading.Thread(target=interrupt, daemon=True).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([Step(0, (), 10)], work, Resources())
        assert time.monotonic() - started < 20  # the call takes 30
    finally:
        over.set()


class Disk:
    """A disk with room for so many bytes, whoever writes them, and however."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.lock = room, threading.Lock()
        some = output_file.OutputFile._some

        def write(file: Any, raw: Any, data: memoryview, at: int) -> int:
            self.take(len(data))
            return some(file, raw, data, at)

        monkeypatch.setattr(output_file.OutputFile, "_some", write)
        monkeypatch.setattr(output_file, "HAS_COPY_FILE_RANGE", False)

    def take(self, size: int) -> None:
        with self.lock:
            self.left -= size
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("room", [100, 300_000, 9_000_000, 20_000_000, 37_000_000])
def test_a_disk_that_fills_while_a_merge_copies_is_told_as_such(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the threads that copy, in those that compute, and at the last tensor."""
    draw = torch.Generator().manual_seed(0)
    base = {f"blocks.{n}.layer.weight": torch.randn(512, 512, generator=draw) for n in range(12)}
    base |= {f"blocks.{n}.rest.weight": torch.zeros(1024, 512) for n in range(12)}
    lora = {
        f"transformer.blocks.{n}.layer.lora_{part}.weight": torch.ones(shape)
        for n in range(12)
        for part, shape in (("A", (2, 512)), ("B", (512, 2)))
    }
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    options = merge.Options(output=out / "merged.safetensors")
    plan = merge.plan(
        tmp_path / "base.safetensors", [(tmp_path / "lora.safetensors", 1.0)], options
    )
    Disk(room, monkeypatch)
    with pytest.raises(CannotWrite, match="disk is full"):
        merge.run(plan)
    assert list(out.iterdir()) == []
