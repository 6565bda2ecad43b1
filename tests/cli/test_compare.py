"""compare on the command line: its document, its summary, its exit codes and its refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.cli import cli
from adaptkit.ops import compare
from tests.cli.test_cli import adaptkit, refused

LORA, STEM = "lora-kohya.safetensors", "lora_unet_mid_block_attentions_0_proj_in"


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The one JSON document on stdout, which holds no NaN or Infinity."""
    done = adaptkit("compare", *arguments, "--json")
    assert done.returncode == code, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(done.stdout, parse_constant=refuse)


def test_options_are_the_fields_of_the_library() -> None:
    command = cli.get_command(click.Context(cli), "compare")
    assert command is not None
    given = command.make_context("compare", ["x", "y"]).params
    chosen = {
        name: value
        for name, value in given.items()
        if name not in ("a", "b", "as_json", "quiet", "verbose")
    }
    assert chosen.keys() == {field.name for field in dataclasses.fields(compare.Options)}
    assert compare.Options(**chosen) == compare.Options()


def test_the_document_has_the_contracts_fields(tiny: Path) -> None:
    record = document(tiny / f"{LORA}:2", tiny / "lora-peft.safetensors")
    assert {"adaptkit", "command", "relative_error", "modules", "only_a", "only_b"} <= record.keys()
    assert record["command"] == "compare"
    assert {"module", "relative_error", "norm_a", "norm_b"} <= record["modules"][0].keys()
    assert "strength" not in record["modules"][0]
    assert (len(record["modules"]), len(record["only_a"]), record["only_b"]) == (80, 24, [])
    assert (record["a"]["strength"], record["a"]["format"], record["b"]["format"]) == (
        2.0,
        "kohya",
        "peft",
    )
    assert record["a"]["algorithms"] == {"lora": 104}
    assert record["relative_error_common"] == 0.0
    assert 0 < record["relative_error"] < 1
    assert (record["tolerance"], record["within_tolerance"], record["base"]) == (None, None, None)


def test_numbers_that_there_are_not_are_null(tiny: Path) -> None:
    record = document(tiny / LORA, f"{tiny / LORA}:0")
    assert (record["relative_error"], record["cosine"], record["norm_b"]) == (None, None, 0.0)
    assert record["modules"][0]["relative_error"] is None


@pytest.mark.parametrize("flag", ["", "--json", "-q"])
def test_an_exceeded_tolerance_exits_1_and_prints_all_the_same(tiny: Path, flag: str) -> None:
    arguments = ["compare", tiny / LORA, tiny / "lora-diffusers.safetensors", *flag.split()]
    done = adaptkit(*arguments, "--tolerance", 0.4)
    assert done.returncode == 1
    assert "error: the relative error 0.5 exceeds the tolerance of 0.4" in done.stderr
    assert "Traceback" not in done.stderr
    kept = adaptkit(*arguments, "--tolerance", 0.6)
    assert (kept.returncode, kept.stderr) == (0, "")
    if flag == "--json":
        assert json.loads(done.stdout)["relative_error"] == 0.5
        assert [json.loads(one.stdout)["within_tolerance"] for one in (done, kept)] == [False, True]
    else:
        assert bool(done.stdout) == bool(kept.stdout) == (flag == "")


def test_the_summary_fits_80_columns(tiny: Path) -> None:
    done = adaptkit("compare", tiny / f"{LORA}:0.5", tiny / "lora-peft.safetensors", COLUMNS="80")
    assert done.stderr == ""
    words = (
        "× 0.5",
        "relative error",
        "cosine",
        "80 in both",
        "only in A",
        "24",
        "and 21 more",
        "worst modules",
    )
    for word in words:
        assert word in done.stdout, word
    table = done.stdout.partition("worst modules")[2].splitlines()
    assert len(table) == 1 + 1 + 5
    assert max(map(len, done.stdout.splitlines())) <= 90  # module names alone fold, on a terminal
    same = adaptkit("compare", tiny / LORA, tiny / LORA).stdout
    assert "0: the same" in same
    assert "worst" not in same


def test_verbose_lists_every_module(tiny: Path) -> None:
    done = adaptkit("compare", tiny / LORA, tiny / "lora-diffusers.safetensors", "-v")
    assert (
        sum(
            "_blocks." in line or "encoder.layers" in line or "mid_block" in line
            for line in done.stdout.splitlines()
        )
        == 104
    )
    assert "norm a" in done.stdout


def test_a_merged_checkpoint(tiny: Path, tmp_path: Path) -> None:
    base, merged = tiny / "base.safetensors", tmp_path / "merged.safetensors"
    assert adaptkit("merge", base, tiny / f"{LORA}:0.8", "-o", merged).returncode == 0
    record = document(tiny / LORA, merged, "--base", base)
    assert record["strength"] == pytest.approx(0.8, rel=2e-3)
    assert record["modules"][0]["strength"] == pytest.approx(0.8, rel=2e-2)
    assert record["relative_error"] == pytest.approx(0.2, rel=2e-2)
    assert (record["outside"], record["only_b"], record["base"]) == (0.0, [], str(base))
    shown = adaptkit("compare", tiny / LORA, merged, "--base", base).stdout
    assert "merged.safetensors − base.safetensors" in shown
    assert "strength" in shown
    assert "nothing of ‖D‖²" in shown
    missing = adaptkit("compare", tiny / LORA, merged)
    refused(missing, "merged.safetensors", "hint:", "--base")


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    lora = tiny / LORA
    refused(
        adaptkit("compare", lora, tiny / "sdxl.safetensors"),
        "sdxl.safetensors",
        "Stable Diffusion XL",
    )
    refused(
        adaptkit("compare", tiny / "base.ckpt", tiny / "tuned.ckpt", "--base", tiny / "base.ckpt"),
        "neither",
        "omit --base",
    )
    refused(adaptkit("compare", lora, tmp_path / "none.safetensors"), "none.safetensors")
    refused(adaptkit("compare", lora, lora, "--only", "nowhere"), "matches no module", "--only")
    refused(adaptkit("compare", lora, lora, "--memory", "1KB"), "working memory", "--memory")
    refused(adaptkit("compare", lora, lora, "--device", "gpu"), "gpu")
    tensors = load_file(lora)
    tensors[f"{STEM}.lora_up.weight"].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    refused(
        adaptkit("compare", lora, tmp_path / "nan.safetensors"),
        "nan.safetensors",
        f"{STEM}.lora_up.weight",
        "NaN",
    )
    save_file({"emb_params": torch.ones(4, 4)}, tmp_path / "embedding.safetensors")
    refused(
        adaptkit("compare", lora, tmp_path / "embedding.safetensors", "--base", tiny / "base.ckpt"),
        "embedding",
    )
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(lora.read_bytes()[:1000])
    for pair in ((lora, bad), (bad, lora)):
        refused(adaptkit("compare", *pair), "bad.safetensors")


def test_a_dora_without_its_base(tiny: Path, tmp_path: Path) -> None:
    for n, name in enumerate("ab"):
        tensors = load_file(tiny / LORA)
        for key in [key for key in tensors if key.endswith("lora_up.weight")]:
            rows = len(tensors[key])
            tensors[key.replace("lora_up.weight", "dora_scale")] = torch.full((rows, 1), 1.0 + n)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    same = document(a, a)
    assert (same["relative_error"], same["norm_a"], same["modules"][0]["norm_a"]) == (
        0.0,
        None,
        None,
    )
    assert "--base" in same["notes"][0]
    shown = adaptkit("compare", a, a)
    assert (
        "note: 80 modules are equal" in shown.stderr
        or "note: 104 modules are equal" in shown.stderr
    )
    refused(adaptkit("compare", a, b), "tensor 'text_encoder", "DoRA", "hint:", "--base")
    record = document(a, b, "--base", tiny / "base.ckpt")
    assert record["relative_error"] > 0
    assert record["norm_a"] > 0


def test_keys_that_are_not_compared_are_named(tiny: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny / LORA) | {"mystery": torch.ones(2)}, tmp_path / "a.safetensors")
    done = adaptkit("compare", tmp_path / "a.safetensors", tiny / LORA)
    assert done.returncode == 0
    assert "1 not compared, the first is mystery: a.safetensors: no such module" in done.stderr
    record = document(tmp_path / "a.safetensors", tiny / LORA, "--tolerance", 0.1, code=1)
    assert (record["unused"][0]["key"], record["within_tolerance"]) == ("mystery", False)


@pytest.mark.parametrize("arguments", [("--tolerance", "-1"), ("--tolerance", "x"), ("--nope",)])
def test_wrong_usage_exits_2(tiny: Path, arguments: tuple[str, ...]) -> None:
    refused(adaptkit("compare", tiny / LORA, tiny / LORA, *arguments), "Usage", code=2)
    refused(adaptkit("compare", tiny / LORA), "Missing argument", code=2)
