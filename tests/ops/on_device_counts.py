"""Launches, waits and copies of a stack of eight layers on a device: upper limits, counted on an emulated one.

`python -m pytest tests/ops/on_device_counts.py -s` prints them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from adaptkit import engine
from adaptkit.ops import advise, compare, extract, merge, resize
from tests import emulated
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
        run_all = engine.run

        def counting(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = dispatch(mode, func, types, args, kwargs)
            self.count(str(func).removeprefix("aten."), func, (args, kwargs or {}), found)
            return found

        def waiting(tensor: Any) -> Any:
            self.seen["back"] += 1
            return tolist(tensor)

        def each(*args: Any) -> Any:
            self.seen.clear()
            notes = run_all(*args)
            self.passes.append(Counter(self.seen))
            return notes

        self.patches = [
            mock.patch.object(emulated._Device, "__torch_dispatch__", counting),
            mock.patch.object(emulated.OnDevice, "tolist", waiting),
            mock.patch.object(engine, "run", each),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def count(self, name: str, func: Any, given: Any, found: Any) -> None:
        def there(tree: Any) -> bool:
            return any(isinstance(leaf, emulated.OnDevice) for leaf in emulated._leaves(tree))

        ours, theirs = there(given), there(found)
        if not (ours or theirs):
            return
        if name.startswith(("_local_scalar_dense", "item", "is_nonzero", "equal")):
            self.seen["waits"] += 1
        elif (func in emulated.MOVES or name.startswith(("to.", "cpu"))) and ours != theirs:
            self.seen["back" if ours else "sent"] += 1
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


# of all eight, in each pass: launches, waits for a number, copies sent, and copies back. A copy back waits too: two of
# them are the tensors written, the others the looks. The first pass of an extraction is the probe
LIMITS = {
    "merge lora": [(6, 0, 1, 2)],
    "merge lokr": [(6, 0, 1, 2)],
    "extract lora": [(120, 0, 6, 2), (87, 0, 5, 5)],
    "extract lokr": [(120, 0, 6, 2), (76, 0, 4, 5)],
    "resize lora": [(34, 0, 3, 4)],
    "advise": [(162, 0, 7, 3)],
    "compare": [(18, 0, 1, 1)],
}


@pytest.mark.parametrize("what", LIMITS)
def test_upper_limits(what: str, files: dict[str, Path], device: str, tmp_path: Path) -> None:
    verb, _, kind = what.partition(" ")
    op = {"merge": merge, "extract": extract, "resize": resize, "advise": advise}.get(verb, compare)
    inputs: dict[str, Any] = {
        "merge": (files["base"], [(files[kind or "lora"], 0.8)]),
        "extract": (files["base"], files["tuned"]),
        "advise": (files["base"], files["tuned"]),
        "resize": (files["lora"],),
        "compare": ((files["lora"], 1.0), (files["other"], 1.0)),
    }
    options: dict[str, Any] = {
        "extract": {"algo": "lokr"} if kind == "lokr" else {"rank": 32},
        "resize": {"rank": 4}, "advise": {"max_rank": 32},
    }  # fmt: skip
    more = {"memory": 2_000_000_000, **options.get(verb, {})}  # a stack of eight
    if kind:
        more["output"] = tmp_path / "o.safetensors"
    with Counted() as counted:
        run(op, inputs[verb], more, device=device)
    names = ("launches", "waits", "sent", "back")
    found = [tuple(seen[name] for name in names) for seen in counted.passes]
    print(what, found)
    for one, limits in zip(found, LIMITS[what], strict=True):
        assert all(number <= most for number, most in zip(one, limits, strict=True)), found
        assert one[0] > 0
