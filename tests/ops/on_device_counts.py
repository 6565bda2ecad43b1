"""Launches, waits, copies and their bytes for a stack of eight layers on a device: limits, counted on an emulated one.

`python -m pytest tests/ops/on_device_counts.py -s` prints them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.files.reader import Reader
from adaptkit.ops import advise, compare, extract, merge, resize
from adaptkit.staging.slabs import ALIGNED
from tests import emulated
from tests.emulated_streams import Streams
from tests.ops.on_device import run

LAYERS, SIDE = 8, 1280
ALLOCATES = ("empty", "new_empty", "is_pinned")


class Counted:
    """What the device sees while the engine computes."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.passes: list[Counter[str]] = []

    def __enter__(self) -> Counted:
        dispatch, tolist = emulated._Device.__torch_dispatch__, emulated.OnDevice.tolist
        run_all, late, into = engine.run, Streams._later, Reader.into

        def counting(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = dispatch(mode, func, types, args, kwargs)
            self.count(str(func).removeprefix("aten."), func, (args, kwargs or {}), found)
            return found

        def waiting(tensor: Any) -> Any:
            self.note("looks", tensor.nbytes)
            return tolist(tensor)

        def reading(reader: Any, view: Any, *place: Any) -> Any:
            if threading.current_thread().name.startswith("adaptkit-read"):
                self.seen["bytes read"] += len(view)
            return into(reader, view, *place)

        def copying(streams: Any, stream: Any, place: Any, to: Any, *more: Any) -> Any:
            way = "results" if to is place else "sent ahead"
            self.note(way, to.nbytes)
            if to is place:  # seen by the dispatcher too, where nothing tells that nobody waits
                self.note("looks", -to.nbytes)
            return late(streams, stream, place, to, *more)

        def each(*args: Any) -> Any:
            self.seen.clear()
            notes = run_all(*args)
            self.passes.append(Counter(self.seen))
            return notes

        self.patches = [
            mock.patch.object(emulated._Device, "__torch_dispatch__", counting),
            mock.patch.object(emulated.OnDevice, "tolist", waiting),
            mock.patch.object(engine, "run", each),
            mock.patch.object(Streams, "_later", copying),
            mock.patch.object(Reader, "into", reading),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def note(self, what: str, size: int) -> None:
        self.seen[what] += 1 if size >= 0 else -1
        self.seen[f"bytes {what}"] += size

    def count(self, name: str, func: Any, given: Any, found: Any) -> None:
        def there(tree: Any) -> bool:
            return any(isinstance(leaf, emulated.OnDevice) for leaf in emulated._leaves(tree))

        ours, theirs = there(given), there(found)
        if not (ours or theirs):
            return
        if name.startswith(("_local_scalar_dense", "item", "is_nonzero", "equal")):
            self.seen["waits"] += 1
        elif (func in emulated.MOVES or name.startswith(("to.", "cpu"))) and ours != theirs:
            self.note("looks" if ours else "sent", found.nbytes)
        elif not name.startswith(ALLOCATES) and not looks_otherwise(func, given, found):
            self.seen["launches"] += 1


def looks_otherwise(func: Any, given: Any, found: Any) -> bool:
    """Whether the result only looks at the memory of an operand: a view, or a cast that changes nothing."""

    def memories(tree: Any) -> set[int]:
        leaves = [leaf for leaf in emulated._leaves(tree) if isinstance(leaf, emulated.OnDevice)]
        return {leaf.host.untyped_storage().data_ptr() for leaf in leaves}

    return not func._schema.is_mutable and memories(found) <= memories(given)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, draw = tmp_path_factory.mktemp("counts"), torch.Generator().manual_seed(0)
    base, tuned, lora, lokr, other = {}, {}, {}, {}, {}
    for n in range(LAYERS):
        key, name = f"blocks.{n}.layer.weight", f"transformer.blocks.{n}.layer"
        base[key] = (torch.randn(SIDE, SIDE, generator=draw) / SIDE**0.5).half()
        noise = torch.randn(SIDE, SIDE, generator=draw) * 0.02 / SIDE**0.5
        tuned[key] = (base[key].float() + noise).half()
        lora[f"{name}.lora_up.weight"] = torch.randn(SIDE, 8, generator=draw).half()
        lora[f"{name}.lora_down.weight"] = torch.randn(8, SIDE, generator=draw).half()
        for factor in ("lora_up", "lora_down"):
            other[f"{name}.{factor}.weight"] = 1.1 * lora[f"{name}.{factor}.weight"]
        lokr[f"{name}.lokr_w1"] = torch.randn(8, 8, generator=draw).half()
        lokr[f"{name}.lokr_w2"] = torch.randn(SIDE // 8, SIDE // 8, generator=draw).half()
    states = {"base": base, "tuned": tuned, "lora": lora, "lokr": lokr, "other": other}
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
    return {name: folder / f"{name}.safetensors" for name in states}


@pytest.fixture
def device() -> Iterator[str]:
    if torch.cuda.is_available():
        pytest.skip("counts are those of the emulated device")
    with emulated.emulated() as name:
        yield name


# of all eight, in each pass: launches, waits for a number, copies sent, looks, and copies of results. A look is a copy back that
# the computing thread waits for, the copies of results are waited for by the writer. The first pass of an extraction is the probe
LIMITS = {
    "merge lora": [(6, 0, 1, 0, 2)],
    "merge lokr": [(6, 0, 1, 0, 2)],
    "extract lora": [(120, 0, 6, 2, 0), (87, 0, 5, 3, 2)],
    "extract lokr": [(120, 0, 6, 2, 0), (51, 0, 3, 2, 2)],
    "extract lokr of rank 4": [(120, 0, 6, 2, 0), (78, 0, 8, 4, 3)],
    "extract lokr of rank 16": [(120, 0, 6, 2, 0), (96, 0, 9, 4, 3)],
    "resize lora": [(34, 0, 3, 2, 2)],
    "advise": [(162, 0, 7, 3, 0)],
    "compare": [(18, 0, 1, 1, 0)],
}
# bytes of a layer, whatever its size: what the host sees, Gram matrices in float64, and with norms what is not stored
LOOKS = {"probe": 5_000_000, "fit": 1_000_000}
NUMBERS = 32
SOLVED = 0.02  # of the bytes read: what the host has solved and sends


@pytest.mark.parametrize("what", LIMITS)
def test_upper_limits(what: str, files: dict[str, Path], device: str, tmp_path: Path) -> None:
    verb, _, kind = what.partition(" ")
    op = {"merge": merge, "extract": extract, "resize": resize, "advise": advise}.get(verb, compare)
    inputs: dict[str, Any] = {
        "merge": (files["base"], [(files.get(kind or "lora"), 0.8)]),
        "extract": (files["base"], files["tuned"]),
        "advise": (files["base"], files["tuned"]),
        "resize": (files["lora"],),
        "compare": ((files["lora"], 1.0), (files["other"], 1.0)),
    }
    options: dict[str, Any] = {
        "extract": {"lora": {"rank": 32}, "lokr": {"algo": "lokr"}}.get(
            kind, {"algo": "lokr", "rank": int(what.split()[-1]) if "rank" in what else 0}
        ),
        "resize": {"rank": 4}, "advise": {"max_rank": 32},
    }  # fmt: skip
    more = {"memory": 2_000_000_000, **options.get(verb, {})}  # a stack of eight
    if kind:
        more["output"] = tmp_path / "o.safetensors"
    with Counted() as counted:
        run(op, inputs[verb], more, device=device)
    names = ("launches", "waits", "sent", "looks", "results")
    found = [tuple(seen[name] for name in names) for seen in counted.passes]
    print(what, found)
    for one, limits in zip(found, LIMITS[what], strict=True):
        assert all(number <= most for number, most in zip(one, limits, strict=True)), found
        assert one[0] > 0
    for n, seen in enumerate(counted.passes):
        print("  ", {name: number for name, number in seen.items() if "bytes" in name})
        read, probing = seen["bytes read"], verb == "advise" or n < len(counted.passes) - 1
        assert read > 0
        assert 0 <= seen["bytes sent ahead"] - read <= 8 * ALIGNED, "each byte read is sent once"
        assert seen["bytes sent"] - seen["bytes sent ahead"] <= SOLVED * read
        assert seen["bytes looks"] <= LAYERS * LOOKS["probe" if probing else "fit"]
    results = sum(seen["bytes results"] for seen in counted.passes)
    assert 0 <= results - (stored(more["output"]) if kind else 0) <= LAYERS * NUMBERS


def stored(path: Path) -> int:
    """The bytes of a file's tensors but for alphas, which are made on the host."""
    return sum(t.nbytes for key, t in load_file(path).items() if not key.endswith("alpha"))
