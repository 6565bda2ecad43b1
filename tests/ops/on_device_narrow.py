"""Every command on a device without float64 and decompositions, as Apple's MPS is: run by `test_device.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.ops import advise, combine, compare, convert, extract, merge, resize
from tests import emulated, made
from tests.ops.merge.test_verify import base_file
from tests.ops.on_device import run
from tests.ops.on_device_stacks import close

NOTE = "has no float64 and no decompositions"


@pytest.fixture
def device() -> Iterator[str]:
    with emulated.emulated(narrow=True) as name:
        yield name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    base = base_file(folder)
    found = {kind: made.adapter(folder / f"{kind}.safetensors", kind) for kind in ("lora", "lokr")}
    options = {"family": "sd1", "output": folder / "tuned.safetensors", "device": "cpu"}
    return {
        "base": base,
        "tuned": run(merge, (base, [(found["lora"], 0.1)]), options).output,
        **found,
    }


@pytest.mark.parametrize(
    ("op", "names", "options"),
    [
        (extract, ("base", "tuned"), {"rank": 2}),
        (extract, ("base", "tuned"), {"algo": "lokr", "size": 4_000}),
        (resize, ("lora",), {"rank": 1}),
        (resize, ("lokr",), {"energy": 0.9}),
        (combine, ([("lora", 0.7), ("lokr", 0.5)],), {}),
        (convert, ("lokr",), {"to": "kohya", "algo": "lora"}),
        (merge, ("base", [("lora", 0.8)]), {"dtype": "fp32"}),
        (compare, (("lora", 1.0), ("lokr", 1.0)), None),
        (advise, ("base", "tuned"), None),
    ],
)
def test_every_verb(
    op: Any, names: Any, options: Any, files: dict[str, Path], device: str, tmp_path: Path
) -> None:
    """What needs float64 is computed on the CPU, to the last bit, and a note says so; a merge is not."""

    def paths(given: Any) -> Any:
        return files[given] if isinstance(given, str) else (files[given[0]], given[1])

    inputs = tuple(
        list(map(paths, name)) if isinstance(name, list) else paths(name) for name in names
    )
    reports, states = {}, {}
    for where in (device, "cpu"):
        more = (
            {} if options is None else {**options, "output": tmp_path / f"{where[:3]}.safetensors"}
        )
        if op in (extract, advise, merge):
            more["family"] = "sd1"
        reports[where] = run(op, inputs, more, device=where)
        states[where] = {} if options is None else load_file(reports[where].output)
    notes = {where: [n for n in report.notes if NOTE in n] for where, report in reports.items()}
    assert notes["cpu"] == []
    if op is merge:
        assert notes[device] == []
        close(*states.values())
        return
    assert [device in note for note in notes[device]] == [True]
    assert states[device].keys() == states["cpu"].keys()
    assert all(torch.equal(tensor, states["cpu"][key]) for key, tensor in states[device].items())
    told = [getattr(report, "relative_error", None) for report in reports.values()]
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", [*made.KINDS, "oft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_merge(kind: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """On the device, but for float64 and rotations."""
    base, adapter = base_file(tmp_path, dtype), tmp_path / "a.safetensors"
    if kind == "oft":
        save_file({f"{made.LINEAR}.oft_blocks": torch.randn(3, 8, 8) * 0.1}, adapter)
    else:
        made.adapter(adapter, kind)
    found, notes = [], []
    for where in ("cpu", device):
        options = {"family": "sd1", "device": where, "overwrite": True}
        report = run(merge, (base, [(adapter, 0.6)]), options, output=tmp_path / "out.safetensors")
        found.append(load_file(report.output))
        notes.append([note for note in report.notes if NOTE in note])
    close(*found)
    assert notes[0] == []
    assert len(notes[1]) == (dtype == torch.float64 or kind == "oft")


def test_the_device_refuses_what_it_has_not(device: str) -> None:
    x = torch.ones(3, 3, device=device)
    refused = (
        x.double,
        lambda: torch.ones(2, dtype=torch.float64).to(device),
        lambda: torch.linalg.qr(x),
        lambda: torch.linalg.eigh(x),
        lambda: torch.linalg.svd(x),
        lambda: torch.linalg.solve(x, x),
        lambda: torch.linalg.cholesky_ex(x),
        lambda: torch.ones(2).to(device, non_blocking=True),
    )
    for each in refused:
        with pytest.raises(
            (TypeError, NotImplementedError, RuntimeError), match="the device has|page-locked"
        ):
            each()
    assert float(torch.linalg.vector_norm(x)) == 3.0
    assert float(x.cpu().double().sum()) == 9.0
