"""`inspect --safety`: what loading a file elsewhere could run, near limits, numbers, metadata."""

from __future__ import annotations

import functools
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptkit.files import limits
from adaptkit.ops import inspect
from tests.cli.test_cli import adaptkit
from tests.fuzz.files import STEM, File, lora, torch_legacy, torch_zip


def safety(path: Path) -> dict[str, Any]:
    record = inspect.run(path, inspect.Options(safety=True)).to_dict()
    json.dumps(record, allow_nan=False)
    return dict(record["safety"])


class Evil:
    """Would leave a file if it were loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "plain"])
def test_all_globals_are_named_and_none_is_called(
    protocol: int, archive: bool, tmp_path: Path
) -> None:
    raw = pickle.dumps({"a": functools.partial, "b": Evil(tmp_path / "mark")}, protocol)
    path = tmp_path / "a.ckpt"
    if archive:
        with zipfile.ZipFile(path, "w") as made:
            made.writestr("x/data.pkl", raw)
    else:
        path.write_bytes(raw)
    found = safety(path)
    assert found["runs_code"] is True
    assert found["globals"] == ["functools.partial", f"{os.mkdir.__module__}.mkdir"]
    assert not (tmp_path / "mark").exists()


def test_a_pickle_that_is_damaged_names_what_was_seen(tmp_path: Path) -> None:
    raw = pickle.dumps({"b": Evil(tmp_path / "mark")}, 2)
    (tmp_path / "a.ckpt").write_bytes(raw[:-3])
    found = safety(tmp_path / "a.ckpt")
    assert (found["runs_code"], found["globals"]) == (True, [f"{os.mkdir.__module__}.mkdir"])
    (tmp_path / "b.ckpt").write_bytes(raw[:12])
    assert safety(tmp_path / "b.ckpt")["runs_code"] is None


def test_what_holds_tensors_only_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "zip.ckpt").write_bytes(torch_zip())
    (tmp_path / "old.ckpt").write_bytes(torch_legacy())
    lora().save(tmp_path / "a.safetensors")
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "b.pt")
    forms = {path.name: safety(path) for path in tmp_path.iterdir()}
    assert {name: found["runs_code"] for name, found in forms.items()} == dict.fromkeys(
        forms, False
    )
    assert forms["a.safetensors"]["format"] == "safetensors"
    assert forms["old.ckpt"]["format"] == "pickle"
    assert forms["b.pt"]["format"] == "torch archive, a zip of a pickle"


def test_a_name_is_not_what_a_file_is(tmp_path: Path) -> None:
    """Loaders go by the name, so a pickle that looks like a header runs all the same."""
    call = b"c" + os.mkdir.__module__.encode() + b"\nmkdir\n(X\x01\0\0\0xtR."
    disguised = b"\x80\x02U\x05aaaa{0" + call  # byte 8 is the brace of a header
    (tmp_path / "a.ckpt").write_bytes(disguised)
    assert disguised[8:9] == b"{"
    assert safety(tmp_path / "a.ckpt")["runs_code"] is True
    (tmp_path / "b.safetensors").write_bytes(disguised)
    assert safety(tmp_path / "b.safetensors")["format"] == "safetensors"
    lora().save(tmp_path / "c.ckpt")
    found = safety(tmp_path / "c.ckpt")
    assert (found["format"], found["runs_code"]) == ("safetensors", False)
    (tmp_path / "d.bin").write_bytes(b"words of no kind" * 9)
    found = safety(tmp_path / "d.bin")
    assert (found["format"], found["runs_code"]) == ("unknown", None)


def test_code_beside_the_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/code/__torch__.py", "def f(): pass")
    assert safety(tmp_path / "a.pt")["code"] == ["a.pt is TorchScript"]
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    lora().save(folder / "model.safetensors")
    assert safety(folder)["runs_code"] is False
    (folder / "unet" / "pipeline.py").write_text("")
    found = safety(folder)
    assert (found["runs_code"], found["code"]) == (True, ["unet/pipeline.py"])


def test_a_limit_that_is_near_is_said(tmp_path: Path) -> None:
    most = limits.LIMITS["key length"].most
    file = lora().add("a" * (most // 2 + 10) + ".weight", 2)
    found = safety(file.save(tmp_path / "a.safetensors"))
    assert [(one["limit"], one["most"]) for one in found["limits"]] == [("key length", most)]
    assert safety(lora().save(tmp_path / "b.safetensors"))["limits"] == []
    file.add("b" * (most + 1), 2)
    (over,) = safety(file.save(tmp_path / "a.safetensors"))["limits"]
    assert over["found"] == most + 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_numbers_that_are_none(dtype: str, tmp_path: Path) -> None:
    file = lora()
    file.add(f"{STEM}q.lora_down.weight", 3, 8, dtype=dtype, value=float("nan"))
    path = file.save(tmp_path / "a.safetensors")
    report = inspect.run(path, inspect.Options(safety=True))
    assert report.record["safety"]["non_finite"] == [f"{STEM}q.lora_down.weight"]
    assert report.broken
    assert not inspect.run(path).broken
    both = inspect.run(path, inspect.Options(safety=True, stats=True))
    assert sum("NaN" in one["what"] for one in both.record["problems"]) == 1


def test_what_is_not_checked_is_said(tmp_path: Path) -> None:
    file = File().add("a.weight", 2, dtype="F8_E8M0").add("b.weight", 2, dtype="I32")
    assert safety(file.save(tmp_path / "a.safetensors"))["not_checked"] == ["F8_E8M0"]


ODD = {
    "hidden characters": {"a": "x\u202ey"},
    "markup": {"a": "<ScRipt src=x>"},
    "no JSON": {"ss_tag_frequency": "{"},
    "120,000 characters": {"a": "x" * 120_000},
}


@pytest.mark.parametrize("what", ODD)
def test_odd_metadata_is_named(what: str, tmp_path: Path) -> None:
    file = lora()
    file.metadata = {"format": "pt", "note": "two\nlines", "ss_bucket_info": "{}", **ODD[what]}
    (one,) = safety(file.save(tmp_path / "a.safetensors"))["metadata"]
    assert one["name"] in ODD[what]
    assert what in one["what"]


def test_the_terminal_shows_it_for_a_refused_file_too(tmp_path: Path) -> None:
    torch.save({"b": Evil(tmp_path / "mark")}, tmp_path / "bad.ckpt")
    lora().save(tmp_path / "a.safetensors")
    done = adaptkit("inspect", tmp_path / "bad.ckpt", tmp_path / "a.safetensors", "--safety")
    assert done.returncode == 1
    assert f"could run code in other programs: {os.mkdir.__module__}.mkdir" in done.stdout
    assert "cannot run code" in done.stdout
    assert done.stderr.count("error:") == 1
