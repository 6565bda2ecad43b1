"""A new kind costs one file: the toys of tests/toys pass through every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adaptkit.algorithms.contract import FitSpec
from adaptkit.keymap.kinds import (
    dense_kind,
    extractable,
    low_rank_kind,
    network_module,
    vector_kind,
)

TOYS = Path(__file__).parent / "toys"
LAYERS = [f"model.diffusion_model.toys.{n}.{layer}.weight" for n in "01" for layer in ("attn.q", "mlp.fc")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grown")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    """What every command reported, by the names in tests/toys/commands.py."""
    done = subprocess.run(
        [sys.executable, TOYS / "commands.py", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def best(change: np.ndarray) -> float:
    """‖·‖² that the best matrix of rank 1 keeps."""
    return float(np.linalg.svd(change.astype(np.float64), compute_uv=False)[0] ** 2)


def changes(folder: Path) -> dict[str, np.ndarray]:
    base, tuned = load_file(folder / "base.safetensors"), load_file(folder / "tuned.safetensors")
    return {name: tuned[name].astype(np.float64) - base[name] for name in LAYERS}


def test_each_toy_is_one_file() -> None:
    folders = [path for path in TOYS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(path.name for path in folders) == [
        "algorithms", "families", "formats", "hosts", "rules",
    ]  # fmt: skip
    for path in folders:
        assert [file.name for file in path.glob("*.py")] == ["toy.py"]


def test_a_toy_algorithm_is_extracted_into_a_toy_format(said: dict[str, Any], folder: Path) -> None:
    report = said["extract"]
    assert (report["algorithm"], report["family"], report["format"]) == ("toy", "toy", "toy")
    stored = load_file(folder / "a.safetensors")
    assert len(stored) == 8
    assert all(key.startswith("toybox.denoiser.") for key in stored)
    whole = kept = 0.0
    for change in changes(folder).values():
        whole, kept = whole + float((change**2).sum()), kept + best(change)
    assert report["relative_error"] == pytest.approx((1 - kept / whole) ** 0.5, rel=1e-5)


def test_inspect_knows_the_toys_and_which_hosts_were_measured(said: dict[str, Any]) -> None:
    (file,) = said["inspect"]["files"]
    assert (file["family"], file["format"], file["algorithms"]) == ("toy", "toy", {"toy": 4})
    assert file["loads_in"] == {
        "a1111": None, "comfyui": None, "diffusers": None, "forge": None, "invokeai": None,
        "kohya": None, "mflux": None, "sdcpp": None, "sdnext": None, "toy": True, "wan2gp": None,
    }  # fmt: skip
    assert file["why"]["comfyui"] == "not measured for toy"
    (file,) = said["inspect lora"]["files"]
    assert set(file["loads_in"].values()) == {None}
    assert set(file["why"].values()) == {"not measured for kohya keys of Toy"}


def test_auto_considers_every_extractable_algorithm(said: dict[str, Any]) -> None:
    """One layer is of rank 1: there the toy algorithm is the smallest form without an error."""
    found = {one["module"]: one["algorithm"] for one in said["extract auto"]["details"]}
    assert found["transformer.toy_blocks.0.to_q"] == "toy"
    assert set(found.values()) == {"toy", "lora"}


def test_a_toy_rule_chooses_ranks(said: dict[str, Any]) -> None:
    # a sixteenth of the ranks that a layer may have, which are 16 and 24
    ranks = [one["rank"] for one in said["extract rule"]["details"]]
    assert ranks == [1, 2, 1, 2]
    before = [one["rank_before"] for one in said["resize rule"]["details"]]
    assert before == [4, 4, 4, 4]
    # half of those that are not zero
    assert all(one["rank"] <= 2 for one in said["resize rule"]["details"])


def test_a_toy_algorithm_is_converted_exactly(said: dict[str, Any], folder: Path) -> None:
    assert said["convert"]["changes"] == said["convert for"]["changes"] == {"renamed": 4}
    assert said["convert for"]["to"] == "toy"
    first, again = load_file(folder / "a.safetensors"), load_file(folder / "f.safetensors")
    assert {key: value.tobytes() for key, value in first.items()} == {
        key: value.tobytes() for key, value in again.items()
    }
    assert said["compare"]["relative_error"] == 0.0


def test_other_algorithms_become_toys(said: dict[str, Any], folder: Path) -> None:
    report = said["convert algo"]
    assert {one["algorithm"] for one in report["details"]} == {"toy"}
    assert report["relative_error"] == pytest.approx(said["extract"]["relative_error"], rel=1e-4)


def test_a_toy_algorithm_is_resized_and_combined(said: dict[str, Any]) -> None:
    assert [one["rank"] for one in said["resize"]["details"]] == [1, 1, 1, 1]
    assert said["resize"]["relative_error"] < 1e-6
    assert [one["rank"] for one in said["combine"]["details"]] == [5, 5, 5, 5]


def test_a_toy_algorithm_is_merged(said: dict[str, Any], folder: Path) -> None:
    assert said["merge"]["modules"] == 4
    base, merged = load_file(folder / "base.safetensors"), load_file(folder / "k.safetensors")
    for name, change in changes(folder).items():
        left = change - (merged[name].astype(np.float64) - base[name])
        expected = (change**2).sum() - best(change)
        assert (left**2).sum() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_family_without_a_measured_host_is_not_called_unsupported(said: dict[str, Any]) -> None:
    assert "not measured: what ComfyUI loads for Toy" in said["convert unmeasured"]
    assert "--to" in said["convert unmeasured"]


def test_help_lists_the_toys(said: dict[str, Any]) -> None:
    hosts = "a1111|comfyui|diffusers|forge|invokeai|kohya|mflux|sdcpp|sdnext|toy|wan2gp"
    assert f"[{hosts}]" in said["help"]
    assert "--toy T" in said["help"]
    assert "lora|lokr|toy|full|auto" in said["help extract"]


def test_the_order_of_kinds_is_stated() -> None:
    assert list(extractable()) == ["lora", "lokr", "full"]
    assert (low_rank_kind().name, dense_kind().name, vector_kind().name) == ("lora", "full", "full")
    assert network_module(["lora"]) == "networks.lora"
    assert network_module(["lora", "full"]) == network_module(["lokr"]) == "lycoris.kohya"


def test_only_kinds_that_take_an_option_read_it() -> None:
    spec = FitSpec(factor=64)
    assert [kind.name for kind in extractable().values() if kind.caution(spec)] == ["lokr"]
    assert not any(kind.caution(FitSpec(factor=8)) for kind in extractable().values())
