"""batch on a Ray cluster: a local one of two workers, which the test starts and stops, gives what processes here give."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptkit.errors import AdaptkitError
from adaptkit.ops import batch
from adaptkit.ops.batch.workers import Processes
from tests.cli.test_cli import adaptkit

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(os.name == "nt", reason="Ray on Windows is not supported"),
]

RECIPE = """
[[matrix]]
command = "merge"
base = "base.safetensors"
adapters = ["tucker-kohya.safetensors", "lokr-kohya.safetensors"]
strengths = [0.25, 0.5]
output = "out/{adapter}-{strength}.safetensors"

[[matrix]]
command = "resize"
adapter = ["lora-kohya.safetensors", "lora-comfy.safetensors", "broken.safetensors"]
rank = [1, 2]
output = "out/{adapter}-{rank}.safetensors"
"""
OPTIONS = batch.Options(jobs=2, keep_going=True, engine="ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="akray", dir="/tmp")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, _temp_dir=folder, **quiet)
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def made(folder: Path, tiny: Path) -> Path:
    folder.mkdir()
    for file in tiny.glob("*.safetensors"):
        shutil.copyfile(file, folder / file.name)
    (folder / "broken.safetensors").write_bytes(b"no safetensors")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.toml"


def events(recipe: Path) -> list[dict[str, Any]]:
    """The log, without what differs from run to run, in the order of the outputs."""
    lines = Path(f"{recipe}.log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        for name in ("time", "seconds", "stamp"):
            record.pop(name, None)
    return sorted(found, key=lambda record: (record["output"], record["event"] != "start"))


def statuses(report: batch.Report) -> str:
    return "".join(result.status[0] for result in report.results)


def test_the_same_files_the_same_log_the_same_failures(tmp_path: Path, tiny: Path) -> None:
    here, there = made(tmp_path / "here", tiny), made(tmp_path / "there", tiny)
    one = batch.run(batch.plan(here, batch.Options(jobs=2, keep_going=True)), engine=Processes(2))
    other = batch.run(batch.plan(there, OPTIONS))
    assert statuses(one) == statuses(other) == "ddddddddff"
    for result in one.results[:8]:
        path = result.job.output
        assert (there.parent / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads(
        json.dumps(events(here)).replace(str(here.parent), str(there.parent))
    ) == events(there)
    assert statuses(batch.run(batch.plan(there, OPTIONS))) == "ssssssssff"
    assert not list((there.parent / "out").glob(".*"))


def test_without_keep_going_the_first_failure_ends_it(tmp_path: Path, tiny: Path) -> None:
    recipe = made(tmp_path / "x", tiny)
    recipe.write_text(
        RECIPE.replace(
            '"lora-kohya.safetensors", ', '"broken.safetensors", "lora-kohya.safetensors", '
        )
    )
    recipe.write_text(recipe.read_text().replace(', "broken.safetensors"]', "]"))
    report = batch.run(batch.plan(recipe, batch.Options(jobs=1, engine="ray")))
    assert len(report.failures) == 1
    assert report.not_run > 0


def test_a_worker_killed_in_mid_job_fails_its_job_alone(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left is removed; the jobs of its bundle, if it had one, are tried again."""
    from adaptkit.ops.batch import ray_engine as _ray

    recipe = made(tmp_path / "x", tiny)
    recipe.write_text(RECIPE.replace(', "broken.safetensors"]', "]"))
    plan = batch.plan(recipe, OPTIONS)
    (victim,) = (job for job in plan.jobs if job.output.name == "lora-kohya-1.safetensors")
    monkeypatch.setattr(_ray, "_Actor", _Stuck)
    victims: list[int] = []

    def watch() -> None:
        mark = recipe.parent / "busy"
        while not mark.exists() or not mark.read_text():
            time.sleep(0.05)
        victims.append(int(mark.read_text()))
        (recipe.parent / "out" / f".lora-kohya-1.safetensors.{victims[0]}-00.part").touch()
        os.kill(victims[0], signal.SIGKILL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    report = batch.run(plan)
    watcher.join(10)
    assert [result.job.output.name for result in report.failures] == [victim.output.name]
    assert "was killed" in str(report.failures[0].outcome.error)
    assert not list((recipe.parent / "out").glob(".*"))
    monkeypatch.undo()
    assert statuses(batch.run(batch.plan(recipe, OPTIONS))).count("d") == 1


class _Stuck:
    """As `_Actor`, but the resize of lora-kohya says that it is at work and goes no further."""

    def __init__(self, folder: str) -> None:
        from adaptkit.ops.batch.ray_engine import _Actor

        self.real = _Actor(folder)

    def pid(self) -> int:
        return self.real.pid()

    def perform(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for record in records:
            if record["options"]["output"].endswith("lora-kohya-1.safetensors"):
                (Path(record["options"]["output"]).parents[1] / "busy").write_text(str(os.getpid()))
                time.sleep(600)
        return self.real.perform(records)


def test_on_the_command_line(tmp_path: Path, tiny: Path) -> None:
    recipe = made(tmp_path / "x", tiny)
    done = adaptkit("batch", recipe, "--engine", "ray", "--jobs", "2", "--keep-going", "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout)
    assert (record["done"], record["failed"]) == (8, 2)


def test_ray_is_asked_for_only_where_it_is_used(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made(tmp_path / "x", tiny)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AdaptkitError, match="--engine ray needs Ray") as caught:
        batch.run(batch.plan(recipe, OPTIONS))
    assert "adaptkit[ray]" in str(caught.value.hint)
    assert not Path(f"{recipe}.log.jsonl").exists()
    batch.run(batch.plan(recipe, batch.Options(jobs=0, keep_going=True)))
