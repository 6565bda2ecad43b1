"""Thousands of files in one `inspect`: held one at a time, and one that kills its process is told."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from adaptkit.errors import InternalError
from adaptkit.ops import inspect
from adaptkit.ops.inspect import folder
from adaptkit.ops.inspect.run import run as plain
from tests.cli.test_cli import adaptkit
from tests.fuzz.files import lora


@pytest.fixture
def files(tmp_path: Path) -> Path:
    home = tmp_path / "files"
    home.mkdir()
    made = lora()
    made.metadata = {"note": "x" * 50_000}
    first = made.save(home / "f00.safetensors")
    for n in range(1, 12):
        shutil.copy(first, home / f"f{n:02}.safetensors")
    return home


@pytest.mark.parametrize("options", [(), ("--csv",), ("--json",)], ids=["text", "csv", "json"])
def test_no_report_is_kept_whole(
    options: tuple[str, ...], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[inspect.Report]] = []
    most = []

    def watched(*given: Any) -> inspect.Report:
        alive = filter(None, (one() for one in seen))
        most.append(sum("metadata" in one.record for one in alive))
        report = plain(*given)
        seen.append(weakref.ref(report))
        return report

    monkeypatch.setattr(folder, "run", watched)
    monkeypatch.setattr(folder, "_PAYS", 1e9)
    done = adaptkit("inspect", files, *options)
    assert done.returncode == 0, done.stderr
    assert len(most) == 12
    assert max(most) <= 2
    assert done.stdout.count("f11.safetensors") == 1


def test_the_json_of_a_stream_is_that_of_a_list(files: Path) -> None:
    (files / "bad.safetensors").write_bytes(b"no")
    whole = adaptkit("inspect", files, "--json", "--sort", "name")
    one_by_one = adaptkit("inspect", files, "--json")
    assert (whole.returncode, one_by_one.returncode) == (1, 1)
    assert one_by_one.stderr == whole.stderr
    first, second = (json.loads(one.stdout) for one in (whole, one_by_one))
    key = lambda record: record["path"]
    assert sorted(first["files"], key=key) == sorted(second["files"], key=key)
    assert one_by_one.stdout == json.dumps(second, ensure_ascii=False, indent=2) + "\n"
    none = adaptkit("inspect", files, "--json", "--where", "family=flux")
    assert [one["path"] for one in json.loads(none.stdout)["files"]] == [
        str(files / "bad.safetensors")
    ]
    (files / "bad.safetensors").unlink()
    none = adaptkit("inspect", files, "--json", "--where", "family=flux")
    assert none.stdout == json.dumps(json.loads(none.stdout), indent=2) + "\n"
    assert json.loads(none.stdout)["files"] == []


def test_a_file_that_kills_its_process_is_its_error(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system kills a process that takes too much memory."""
    from concurrent.futures.process import BrokenProcessPool

    paths = sorted(files.iterdir())[:3]

    class Pool:
        """One process, which the second file kills."""

        def __init__(self, *_: object) -> None:
            self.dead = False

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, work: Any, given: list[str], options: Any) -> Any:
            self.dead = self.dead or Path(given[0]) == paths[1]

            class Job:
                def result(_) -> Any:
                    if self.dead:
                        raise BrokenProcessPool
                    return work(given, options)

            return Job()

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Pool)
    found = list(folder._apart(paths, inspect.Options()))
    assert [one.record["path"] for one in found] == list(map(str, paths))
    assert [isinstance(one.error, InternalError) for one in found] == [False, True, False]
    assert "was killed" in str(found[1].error)
