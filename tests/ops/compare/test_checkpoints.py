"""compare: two checkpoints, against NumPy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptkit import ops
from adaptkit.errors import AdaptkitError, NoSuchName
from tests.cli.test_cli import adaptkit

Array = np.ndarray


def distance(a: dict[str, Array], b: dict[str, Array]) -> tuple[float, int]:
    """‖A − B‖ / ‖B‖ over all tensors, one that is missing counting as zero, and how many differ."""
    error = norm = 0.0
    for name in a.keys() | b.keys():
        x, y = (side.get(name, np.zeros(())).astype(np.float64) for side in (a, b))
        error, norm = error + float(((x - y) ** 2).sum()), norm + float((y**2).sum())
    differ = sum(not np.array_equal(a[name], b[name]) for name in a.keys() & b.keys())
    return (error / norm) ** 0.5, differ


def compared(a: Path, b: Path, **options: object) -> ops.compare.Report:
    found: ops.compare.Report = ops.compare.run(
        ops.compare.plan(a, b, ops.compare.Options(**options))  # type: ignore[arg-type]
    )
    return found


def test_the_distance_is_that_of_numpy(tiny: Path) -> None:
    one, two = tiny / "tuned.safetensors", tiny / "base.safetensors"
    error, differ = distance(load_file(one), load_file(two))
    found = compared(one, two)
    assert found.relative_error == pytest.approx(error, rel=1e-12)
    assert (found.differ, len(found.modules)) == (differ, 882)
    other = compared(tiny / "tuned.ckpt", two)  # the same weights as a pickle
    assert other.relative_error == pytest.approx(error, rel=1e-12)
    assert {m.module: m.relative_error for m in other.modules} == {
        m.module: m.relative_error for m in found.modules
    }
    same = compared(tiny / "base.ckpt", two, tolerance=0.0)
    assert (same.relative_error, same.differ, same.exceeded) == (0.0, 0, None)


def test_a_layer_of_only_one_counts_in_full(tiny: Path, tmp_path: Path) -> None:
    stored = load_file(tiny / "tuned.safetensors")
    gone = next(n for n, t in stored.items() if t.ndim == 2 and "transformer_blocks" in n)
    one = tmp_path / "one.safetensors"
    save_file({name: t for name, t in stored.items() if name != gone}, one)
    base = load_file(tiny / "base.safetensors")
    error, _ = distance(load_file(one), base)
    found = compared(one, tiny / "base.safetensors")
    assert found.relative_error == pytest.approx(error, rel=1e-12)
    assert (found.only_a, found.only_b) == ((), (gone,))
    error, _ = distance(base, load_file(one))
    found = compared(tiny / "base.safetensors", one)
    assert found.relative_error == pytest.approx(error, rel=1e-12)
    assert (found.only_a, found.only_b) == ((gone,), ())


def test_a_folder_of_diffusers_is_the_same_model(tiny: Path, tmp_path: Path) -> None:
    adaptkit(
        *("merge", tiny / "base.safetensors", f"{tiny / 'lora-kohya.safetensors'}:0"),
        *("--layout", "folder", "-o", tmp_path / "folder"),
    )
    found = compared(tmp_path / "folder", tiny / "base.safetensors")
    assert (found.relative_error, found.differ) == (0.0, 0)


def test_parts_are_selected_and_odd_input_is_refused(tiny: Path, tmp_path: Path) -> None:
    one, two = tiny / "tuned.safetensors", tiny / "base.safetensors"
    whole, part = compared(one, two), compared(one, two, only="te")
    assert 0 < len(part.modules) < len(whole.modules)
    assert all(m.module.startswith("text_encoder") for m in part.modules)
    with pytest.raises(NoSuchName):
        compared(one, two, only="unte")
    with pytest.raises(AdaptkitError, match="takes no strength"):
        ops.compare.plan((one, 0.5), two, ops.compare.Options())
    bad = load_file(two)
    name = next(
        name for name, tensor in bad.items() if tensor.dtype.kind == "f" and tensor.ndim > 1
    )
    bad[name][0] = np.nan
    save_file(bad, tmp_path / "nan.safetensors")
    with pytest.raises(AdaptkitError, match="not finite"):
        compared(tmp_path / "nan.safetensors", two)


def test_the_screen_and_the_document_say_so(tiny: Path) -> None:
    one, two = tiny / "tuned.safetensors", tiny / "base.safetensors"
    done = adaptkit("compare", one, two)
    assert done.returncode == 0, done.stderr
    assert "882 in both, 210 of them differ" in done.stdout
    document = json.loads(adaptkit("compare", one, two, "--json").stdout)
    assert (document["differ"], document["a"]["kind"]) == (210, "checkpoint")
    assert adaptkit("compare", one, two, "--tolerance", "0.01").returncode == 1
