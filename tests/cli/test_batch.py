"""batch on the command line: a hundred merges with three broken inputs, an interrupt in the middle, streams and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from adaptkit.cli import cli
from adaptkit.ops import batch
from tests.cli.test_cli import adaptkit, refused

HUNDRED = """
[defaults.merge]
base = "base.safetensors"
output = "merged/{adapter}.safetensors"

[[matrix]]
command = "merge"
adapters = [%s]
"""
RESIZE = """
[[matrix]]
command = "resize"
adapter = "lora-kohya.safetensors"
rank = [1, 2]
output = "out/{adapter}-{rank}.safetensors"
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    for name in ("base", "lora-kohya", "tucker-kohya", "sdxl"):
        shutil.copyfile(tiny / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def done(path: Path) -> list[str]:
    """The outputs that the log calls done, in order."""
    records = map(json.loads, Path(f"{path}.log.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["output"] for record in records if record["event"] == "done"]


def test_options_are_the_fields_of_the_library() -> None:
    command = cli.get_command(click.Context(cli), "batch")
    assert command is not None
    given = command.make_context("batch", ["x"]).params
    chosen = {
        k: v
        for k, v in given.items()
        if k not in ("recipe", "as_json", "quiet", "verbose", "dry_run")
    }
    assert chosen.keys() == {field.name for field in dataclasses.fields(batch.Options)}
    assert batch.Options(**chosen) == batch.Options()


def test_a_hundred_merges_with_three_broken_inputs(folder: Path) -> None:
    whole = (folder / "tucker-kohya.safetensors").read_bytes()
    for n in range(100):
        (folder / f"a{n:02}.safetensors").write_bytes(whole)
    (folder / "a17.safetensors").write_bytes(whole[:-100])
    (folder / "a41.safetensors").unlink()
    shutil.copyfile(folder / "sdxl.safetensors", folder / "a66.safetensors")  # of another family
    path = write(folder, HUNDRED % ", ".join(f'"a{n:02}.safetensors"' for n in range(100)))

    first = adaptkit("batch", path, "--keep-going", "--jobs", "2")
    assert first.returncode == 1
    assert len(first.stdout.splitlines()) == 97 == len(done(path))
    assert "97 done · 3 failed" in first.stderr
    assert first.stderr.count("error:") == 1
    assert "3 jobs failed, 97 succeeded" in first.stderr
    for name, why in (
        ("a17", "truncated"),
        ("a41", "no such file"),
        ("a66", "Stable Diffusion XL"),
    ):
        (line,) = (line for line in first.stderr.splitlines() if f"{name}.safetensors: " in line)
        assert line.startswith("[[matrix]] 1 (line 6), ")
        assert why in line
    assert len(list((folder / "merged").iterdir())) == 97, "no leftovers, hidden or not"

    again = adaptkit("batch", path, "--keep-going", "--jobs", "0", "--json")
    assert again.returncode == 1
    record = json.loads(again.stdout)
    assert (record["jobs"], record["done"], record["skipped"], record["failed"]) == (100, 0, 97, 3)
    assert [failure["job"] for failure in record["failures"]] == [18, 42, 67]

    for name in ("a17", "a41", "a66"):
        (folder / f"{name}.safetensors").write_bytes(whole)
    repaired = adaptkit("batch", path, "--jobs", "0")
    assert repaired.returncode == 0
    assert sorted(Path(line).stem for line in repaired.stdout.splitlines()) == ["a17", "a41", "a66"]
    assert "3 done · 97 skipped" in repaired.stderr
    assert len({file.read_bytes()[-1000:] for file in (folder / "merged").iterdir()}) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("sent", "jobs"), [(signal.SIGINT, 2), (signal.SIGKILL, 0)])
def test_an_interrupted_batch_goes_on(sent: signal.Signals, jobs: int, folder: Path) -> None:
    count = 20  # a signal takes a moment to arrive
    for n in range(count):
        shutil.copyfile(folder / "lora-kohya.safetensors", folder / f"a{n}.safetensors")
    path = write(folder, HUNDRED % ", ".join(f'"a{n}.safetensors"' for n in range(count)))
    command = [sys.executable, "-m", "adaptkit", "batch", str(path), "--jobs", str(jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline().endswith(".safetensors\n")
        run.send_signal(sent)
        _, said = run.communicate(timeout=30)
    assert run.returncode == (130 if sent == signal.SIGINT else -sent)
    assert "Traceback" not in said
    before = len(done(path))
    assert 1 <= before < count
    if sent == signal.SIGINT:
        assert f"of {count} jobs have ended; run the same command to continue" in said
        assert "interrupted" in said
        assert not list((folder / "merged").glob(".*")), "what was half written is gone"
    assert adaptkit("batch", path, "--jobs", "0").returncode == 0
    assert len(done(path)) == count == len(set(done(path)))


def test_streams(folder: Path) -> None:
    path = write(folder, RESIZE)
    first = adaptkit("batch", "recipe.toml", "--jobs", "0", cwd=folder)
    assert first.stdout.splitlines() == [
        "out/lora-kohya-1.safetensors",
        "out/lora-kohya-2.safetensors",
    ]
    assert "recipe.toml.log.jsonl" in first.stderr
    assert adaptkit("batch", path, "--jobs", "0", "-q").stderr == ""
    record = json.loads(adaptkit("batch", path, "--jobs", "0", "--json").stdout)
    assert record["command"] == "batch"
    assert [item["status"] for item in record["details"]] == ["skipped", "skipped"]
    table = adaptkit("batch", path, "--jobs", "0", "-v").stderr
    assert "skipped" in table
    assert "lora-kohya-2.safetensors" in table


def test_dry_run(folder: Path) -> None:
    path = write(folder, HUNDRED % '"lora-kohya.safetensors", "tucker-kohya.safetensors"' + RESIZE)
    shown = adaptkit("batch", path, "--dry-run")
    assert shown.returncode == 0
    assert shown.stdout.count("would write") == 4
    assert "4 of 4" in shown.stdout
    assert "peak memory" in shown.stdout
    record = json.loads(adaptkit("batch", path, "--dry-run", "--json").stdout)
    assert record["dry_run"] is True
    assert [plan["command"] for plan in record["plans"]] == ["merge", "merge", "resize", "resize"]
    (folder / "tucker-kohya.safetensors").unlink()
    broken = adaptkit("batch", path, "--dry-run")
    assert broken.returncode == 1
    assert "tucker-kohya.safetensors: " in broken.stderr
    assert not list(folder.glob("recipe.toml.*"))
    assert not (folder / "merged").exists()


def test_a_dry_run_needs_no_torch(folder: Path) -> None:
    path = write(folder, HUNDRED % '"lora-kohya.safetensors"' + RESIZE)
    code = (
        f"import sys\nfrom adaptkit.cli import main\nsys.argv = ['adaptkit', 'batch', {str(path)!r}, '--dry-run']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_refusals(folder: Path) -> None:
    path = write(folder, RESIZE.replace("rank =", "ranks ="))
    refused(
        adaptkit("batch", path),
        "recipe.toml: [[matrix]] 1 (line 2): unknown option 'ranks'",
        "rank",
    )
    refused(adaptkit("batch", folder / "none.toml"), "no such file")
    refused(adaptkit("batch", write(folder, RESIZE), "--jobs", "-1"), "--jobs", code=2)
    assert not list(folder.glob("*.jsonl"))
