"""Recipes and logs that a stranger or an accident wrote."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from adaptkit.errors import AdaptkitError, WrongUsage
from adaptkit.ops import batch
from adaptkit.ops.batch.log import _lines
from adaptkit.ops.batch.output_names import filled
from adaptkit.ops.batch.workers import Processes, WorkerProcess
from adaptkit.ops.finding import found_in
from tests.fuzz.files import lora

CONVERT = '[[job]]\ncommand = "convert"\nadapter = "{name}"\nto = "comfy"\nfamily = "sd1"\noutput = "{output}"\n'


def recipe(folder: Path, *jobs: tuple[str, str]) -> Path:
    path = folder / "recipe.toml"
    path.write_text("".join(CONVERT.format(name=name, output=out) for name, out in jobs))
    return path


@pytest.mark.parametrize("form", [">3000000000", "0>300", ".5000f", ">1000"])
def test_the_width_of_a_template_is_bounded(form: str) -> None:
    with pytest.raises(WrongUsage, match="wider than 99"):
        filled("{adapter:%s}" % form, {"adapter": "a"}, "job 1")


@pytest.mark.parametrize(
    ("name", "why"),
    [("a" * 300, "characters"), ("nul.safetensors", "Windows"), ("out/con", "Windows"), ("x. ", "Windows")],
)  # fmt: skip
def test_names_of_outputs_are_portable(name: str, why: str) -> None:
    with pytest.raises(WrongUsage, match=why):
        filled("{adapter}" if "/" not in name else name, {"adapter": name}, "job 1")
    assert filled("{a}", {"a": "x\u202ey\x1b/z"}, "job 1") == "x_y__z"


@pytest.mark.parametrize("output", ["../out.safetensors", "/elsewhere.safetensors", "a/../../b"])
def test_an_output_leaves_the_folder_only_if_allowed(tmp_path: Path, output: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    lora().save(home / "a.safetensors")
    path = recipe(home, ("a.safetensors", output))
    with pytest.raises(AdaptkitError, match="outside the folder of the recipe"):
        batch.plan(path, batch.Options(jobs=0))
    assert batch.plan(path, batch.Options(jobs=0, allow_outside=True)).jobs


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    path = recipe(tmp_path, ("~no-such-user-x/a.safetensors", "b.safetensors"))
    with pytest.raises(WrongUsage, match="in no known home folder"):
        batch.plan(path, batch.Options(jobs=0))


def test_a_pattern_that_is_no_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which patterns are none depends on the version of Python: a**b until 3.12."""

    def refuse(*_: object) -> None:
        raise ValueError("Invalid pattern")

    monkeypatch.setattr(Path, "glob", refuse)
    path = tmp_path / "recipe.toml"
    line = '[[matrix]]\ncommand = "convert"\nadapters = "a**b"\nto = "comfy"\noutput = "o/{adapter}.safetensors"\n'
    path.write_text(line)
    with pytest.raises(WrongUsage, match="is no glob: Invalid pattern"):
        batch.plan(path, batch.Options(jobs=0))
    with pytest.raises(WrongUsage, match="is no glob: Invalid pattern"):
        list(found_in([tmp_path / "a**b"]))


def test_a_log_cut_in_half_or_interleaved_is_repaired(tmp_path: Path) -> None:
    """No job refuses an output of its own; those whose line is whole are skipped."""
    names = [f"{n}.safetensors" for n in range(4)]
    for name in names:
        lora().save(tmp_path / name)
    path = recipe(tmp_path, *((name, f"out-{name}") for name in names))
    options = batch.Options(jobs=0, keep_going=True)
    first = batch.run(batch.plan(path, options))
    assert first.count("done") == 4
    log = path.with_name("recipe.toml.log.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    again = batch.run(batch.plan(path, options))
    assert again.count("failed") == 0
    assert again.count("skipped") > 0
    # the second half of a line is lost, and the next follows it
    lines = whole.splitlines()
    log.write_bytes(lines[0][: len(lines[0]) // 2] + lines[1] + b"\n" + b"\n".join(lines[2:]))
    assert len(list(_lines(log))) == len(lines) - 1
    # a file of the same name that is another's is not replaced
    log.unlink()
    lora().save(tmp_path / "out-0.safetensors")
    last = batch.run(batch.plan(path, options))
    assert (last.count("failed"), last.count("done")) == (1, 3)


def test_a_job_that_hangs_fails_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        lora().save(tmp_path / f"{name}.safetensors")
    path = recipe(
        tmp_path, ("a.safetensors", "oa.safetensors"), ("b.safetensors", "ob.safetensors")
    )
    send = WorkerProcess.send

    def hang(self: WorkerProcess, bundle) -> None:
        if bundle[0].number == 1:
            self.began = time.monotonic() - 1000
        else:
            send(self, bundle)

    monkeypatch.setattr(WorkerProcess, "send", hang)
    plan = batch.plan(path, batch.Options(jobs=1, keep_going=True, timeout=120))
    report = batch.run(plan, engine=Processes(1, 120))
    assert [result.status for result in report.results] == ["failed", "done"]
    assert "longer than --timeout" in str(report.failures[0].outcome.error)
    assert json.dumps(report.to_dict())
    with pytest.raises(WrongUsage, match="worker processes"):
        batch.plan(path, batch.Options(jobs=0, timeout=1))
