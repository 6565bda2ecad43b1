"""Slabs: what is read into them is what would have been stacked, in one piece, in memory that is made once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from adaptkit.engine import Resources, Step, Work, run
from adaptkit.errors import ShapeMismatch
from adaptkit.files.open import open_source
from adaptkit.staging.slabs import ALIGNED, Ring, Slab
from adaptkit.steps import IN_FLIGHT

LAYERS = 5


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """Tensors of three dtypes for each layer, some of odd sizes."""
    draw = torch.Generator().manual_seed(0)
    state = {}
    for n in range(LAYERS):
        state[f"{n}.w"] = torch.randn(7, 9, generator=draw).half()
        state[f"{n}.up"] = torch.randn(7, 3, generator=draw)
        state[f"{n}.flag"] = torch.tensor(n % 2 == 0)
        state[f"{n}.eight"] = torch.randn(5, generator=draw).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as found:
        yield found


def memory(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def slab_of(size: int) -> Slab:
    return Slab(memory(size))


def layer(source: Any, n: int) -> dict[str, torch.Tensor]:
    return {key: source.read(f"{n}.{key}") for key in ("w", "up", "flag", "eight")}


def wanted(source: Any, numbers: range, load: Any = layer) -> dict[str, torch.Tensor]:
    loaded = [load(source, n) for n in numbers]
    return {key: torch.stack([tensors[key] for tensors in loaded]) for key in loaded[0]}


def staged(
    slab: Slab, source: Any, numbers: range, load: Any = layer
) -> tuple[dict[str, torch.Tensor], list[int]]:
    sizes: list[int] = []

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor.clone()

    made = slab.stack([lambda n=n: load(source, n) for n in numbers])
    return made.sent(send), sizes


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        other = two[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        assert torch.equal(tensor.view(torch.uint8), other.contiguous().view(torch.uint8)), key


def test_a_stack_lies_in_one_piece_and_is_sent_at_once(source: Any) -> None:
    want = wanted(source, range(LAYERS))
    slab = slab_of(4096)
    with mock.patch.object(torch, "stack", side_effect=AssertionError("copied")):
        found, sizes = staged(slab, source, range(LAYERS))
        again, _ = staged(slab, source, range(1, 3))  # a second stack behind the first
    same(found, want)
    same(again, wanted(source, range(1, 3)))
    assert len(sizes) == 1
    assert (
        sum(t.nbytes for t in want.values())
        <= sizes[0]
        <= sum(t.nbytes for t in want.values()) + 4 * ALIGNED
    )


@pytest.mark.parametrize("size", [0, 64, 700, 1000])
def test_what_finds_no_room_is_stacked_apart(source: Any, size: int) -> None:
    found, _ = staged(slab_of(size), source, range(LAYERS))
    same(found, wanted(source, range(LAYERS)))


def test_what_a_loader_makes_is_copied_and_what_it_used_is_not_sent(source: Any) -> None:
    def made(source: Any, n: int) -> dict[str, torch.Tensor]:
        return {"sum": source.read(f"{n}.w").float() + 1.0, "up": source.read(f"{n}.up").mT}

    found, sizes = staged(slab_of(8192), source, range(LAYERS), made)
    want = wanted(source, range(LAYERS), made)
    same(found, want)
    assert sum(sizes) == sum(t.nbytes for t in want.values())


def test_reads_in_another_order_are_right(source: Any) -> None:
    def turned(source: Any, n: int) -> dict[str, torch.Tensor]:
        keys = ["w", "up", "flag", "eight"]
        read = {key: source.read(f"{n}.{key}") for key in (keys[::-1] if n == 2 else keys)}
        return {key: read[key] for key in keys}

    found, _ = staged(slab_of(8192), source, range(LAYERS), turned)
    same(found, wanted(source, range(LAYERS)))


def test_unlike_members_are_refused(source: Any) -> None:
    def unlike(source: Any, n: int) -> dict[str, torch.Tensor]:
        return {"w": source.read(f"{n}.up" if n == 2 else f"{n}.w")}

    with pytest.raises(RuntimeError, match="'w' differs"):
        staged(slab_of(8192), source, range(LAYERS), unlike)


def test_reading_elsewhere_ends_with_the_block(source: Any) -> None:
    slab = slab_of(8192)
    staged(slab, source, range(2))
    used = slab.used
    source.read("0.w")
    assert slab.used == used


def test_a_ring_makes_no_more_than_its_slabs_and_waits_for_one() -> None:
    ring = Ring(100, 2, memory)
    one, two = ring.take(lambda: True), ring.take(lambda: True)
    assert one is not None
    assert two is not None
    assert ring.take(lambda: False) is None
    one.used = 50
    timer = threading.Timer(0.05, ring.give, (one,))
    timer.start()
    assert ring.take(lambda: True) is one
    assert one.used == 0


@pytest.mark.parametrize("memory", [2000, 8000, None])
def test_a_device_run_makes_few_slabs_reads_once_and_stores_in_order(
    source: Any, memory: int | None
) -> None:
    """Forty steps over five layers, on a device that is the CPU under another name."""
    made, sent, stored = [], [], []
    real = Slab.__init__

    def counted(slab: Slab, buffer: torch.Tensor) -> None:
        made.append(len(buffer))
        real(slab, buffer)

    def kernel(numbers: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
        same(
            tensors,
            {
                key: torch.stack([layer(source, n % LAYERS)[key] for n in numbers])
                for key in tensors
            },
        )
        sent.append(len(numbers))
        return list(numbers)

    steps = [Step(n, "alike" if n % 7 else "other", 400, (n, 0)) for n in range(40)]
    work = Work(
        lambda n: layer(source, n % LAYERS), kernel, lambda n, found: stored.append((n, found))
    )
    with (
        mock.patch.object(Slab, "__init__", counted),
        mock.patch.object(Resources, "on_cpu", property(lambda _: False)),
    ):
        run(steps, work, Resources("cpu", memory))
    assert sorted(stored) == [(n, n) for n in range(40)]
    assert sum(sent) == 40
    assert 1 <= len(made) <= IN_FLIGHT
    assert sum(made) <= (memory or 560_000_000)


def test_memory_that_is_given_gets_what_a_read_gives(tmp_path: Path) -> None:
    """Strided and compressed tensors too, whole and by rows; other sizes are refused."""
    plain = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    state = {
        "plain": plain,
        "turned": plain.mT,
        "wide": plain[:1].expand(4, 5),
        "half": plain.half(),
    }
    torch.save(state, tmp_path / "a.pt")
    save_file({"plain": plain, "half": plain.half()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        with open_source(tmp_path / name) as found:
            for key in found.infos:
                for rows in (None, slice(1, 3), slice(2, 2)):
                    want = found.read(key, rows)
                    out = torch.full((want.nbytes,), 255, dtype=torch.uint8)
                    found.read_into(out, key, rows)
                    assert torch.equal(out.view(want.dtype).view(want.shape), want)
                    part = state[key] if rows is None else state[key][rows]
                    assert torch.equal(want, part)
                with pytest.raises(ShapeMismatch, match="bytes of memory"):
                    found.read_into(torch.empty(7, dtype=torch.uint8), key)


def test_strided_tensors_are_staged_in_one_piece(tmp_path: Path) -> None:
    torch.save({str(n): torch.randn(6, 5).mT for n in range(3)}, tmp_path / "a.pt")
    with open_source(tmp_path / "a.pt") as found:
        sizes: list[int] = []
        slab = slab_of(4096)
        made = slab.stack([lambda n=n: {"x": found.read(str(n))} for n in range(3)])
        sent = made.sent(lambda t: sizes.append(t.nbytes) or t.clone())  # type: ignore[func-returns-value]
        assert torch.equal(sent["x"], torch.stack([found.read(str(n)) for n in range(3)]))
    assert sizes == [3 * 30 * 4]
