"""resize and combine on the command line: documents, default names, summaries, exit codes and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import adaptkit, refused

LORA, LOKR = "lora-kohya.safetensors", "lokr-kohya.safetensors"
REPORT = {
    "output",
    "bytes",
    "modules",
    "parameters",
    "relative_error",
    "unused",
    "seconds",
    "details",
}


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A folder with a space and another script in its name, holding a LoRA and a LoKr."""
    made = tmp_path / "мои адаптеры"
    made.mkdir()
    for name in (LORA, LOKR):
        shutil.copy(tiny / name, made)
    return made


def document(*arguments: object) -> dict[str, Any]:
    done = adaptkit(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_resize_writes_beside_its_input_and_reports(folder: Path) -> None:
    record = document("resize", folder / LORA, "--rank", 1)
    assert record.keys() >= REPORT | {
        "adaptkit",
        "command",
        "family",
        "from",
        "to",
        "changes",
        "notes",
    }
    output = folder / "lora-kohya-rank1.safetensors"
    assert (record["output"], record["bytes"]) == (str(output), output.stat().st_size)
    assert (record["modules"], record["changes"]) == (104, {"resized": 104})
    assert {one["rank"] for one in record["details"]} == {1}
    assert {one["rank_before"] for one in record["details"]} == {2}
    assert 0.3 < record["relative_error"] < 0.8
    tensors = load_file(output)
    stems = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    lost = total = 0.0
    for stem in stems:
        whole, kept = (_delta(t, stem) for t in (load_file(folder / LORA), tensors))
        lost, total = (
            lost + float((whole - kept).square().sum()),
            total + float(whole.square().sum()),
        )
    assert record["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def _delta(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    up, down = (
        tensors[f"{stem}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down")
    )
    return up @ down * float(tensors[f"{stem}.alpha"]) / down.shape[0]


def test_a_size_is_never_exceeded_and_what_is_left_out_is_said(folder: Path) -> None:
    done = adaptkit("resize", folder / LORA, "--size", "45KB")
    output = folder / "lora-kohya-45KB.safetensors"
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    assert 0.97 * 45_000 < output.stat().st_size <= 45_000
    assert "unchanged" in done.stderr
    assert "modules are left out" in done.stderr


def test_one_rule_and_only_one(folder: Path) -> None:
    before = sorted(folder.iterdir())
    refused(adaptkit("resize", folder / LORA), "--rank", "--size", code=2)
    refused(
        adaptkit("resize", folder / LORA, "--rank", 1, "--error", 0.1), "--rank", "--error", code=2
    )
    refused(adaptkit("resize", folder / LORA, "--rank", 0), code=2)
    refused(adaptkit("resize", folder / LORA, "--energy", 1.5), "--energy", code=2)
    refused(adaptkit("resize", folder / LORA, "--size", 300), "hint:", "--size")
    assert sorted(folder.iterdir()) == before


def test_an_output_is_not_replaced_unasked(folder: Path) -> None:
    kept = folder / "out.safetensors"
    kept.write_bytes(b"mine")
    refused(adaptkit("resize", folder / LORA, "--rank", 1, "-o", kept), "--overwrite")
    assert kept.read_bytes() == b"mine"
    assert (
        adaptkit("resize", folder / LORA, "--rank", 1, "-o", kept, "--overwrite", "-q").returncode
        == 0
    )
    assert len(load_file(kept)) == 312


def test_nan_is_named_and_nothing_is_written(folder: Path) -> None:
    tensors = load_file(folder / LORA)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0] = float("nan")
    save_file(tensors, folder / "nan.safetensors")
    refused(
        adaptkit("resize", folder / "nan.safetensors", "--rank", 1), "nan.safetensors", key, "NaN"
    )
    assert not list(folder.glob("nan-*"))


def test_combine_says_what_went_in(folder: Path) -> None:
    done = adaptkit(
        "combine",
        f"{folder / LORA}:0.5",
        f"{folder / LOKR}:-1",
        "--rank",
        2,
        "-o",
        folder / "sum.safetensors",
    )
    assert (done.returncode, done.stdout) == (0, f"{folder / 'sum.safetensors'}\n"), done.stderr
    assert "lora-kohya.safetensors × 0.5" in done.stderr
    assert "lokr-kohya.safetensors × -1" in done.stderr
    assert "relative error" in done.stderr


def test_an_adapter_less_itself_is_zero(folder: Path) -> None:
    record = document(
        "combine", folder / LORA, f"{folder / LORA}:-1", "-o", folder / "zero.safetensors"
    )
    assert any("cancel" in note for note in record["notes"])
    assert not any(
        t.any() for key, t in load_file(folder / "zero.safetensors").items() if "lora_up" in key
    )


def test_combine_refuses_what_is_for_another_model(folder: Path, tiny: Path) -> None:
    done = adaptkit(
        "combine", folder / LORA, tiny / "sdxl.safetensors", "-o", folder / "no.safetensors"
    )
    refused(done, "Stable Diffusion XL", "Stable Diffusion 1.x")
    refused(
        adaptkit("combine", folder / LORA, folder / LOKR, "--density", 0.5), "--density", code=2
    )
    assert not (folder / "no.safetensors").exists()


@pytest.mark.parametrize("command", [("resize", LORA, "--energy", "0.9"), ("combine", LORA, LOKR)])
def test_dry_runs_write_nothing(folder: Path, command: tuple[str, ...]) -> None:
    before = sorted(folder.iterdir())
    done = adaptkit(*command, "--dry-run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["modules"] >= 104
    assert sorted(folder.iterdir()) == before
