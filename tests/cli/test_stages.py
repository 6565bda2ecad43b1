"""The stages of a command: what a callback is told, what a terminal shows, and what a log file keeps."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

import adaptkit as ak
from adaptkit import ops
from adaptkit.cli.show.live import stages as live
from adaptkit.ops.many import run_many
from adaptkit.ops.stages import STAGES
from tests.cli.test_cli import adaptkit

LORA, LOKR = "lora-kohya.safetensors", "lokr-kohya.safetensors"
Told = list[tuple[str, int, int, str]]


def told(work: Callable[[Callable[[str, int, int, str], None]], object]) -> Told:
    """What a callback is told, each stage from 0 to its total without a step back."""
    seen: Told = []
    work(lambda *one: seen.append(one))
    assert {one[0] for one in seen} <= STAGES.keys()
    for stage in dict.fromkeys(one[0] for one in seen):
        mine = [one for one in seen if one[0] == stage]
        first = next(n for n, one in enumerate(seen) if one[0] == stage)
        assert seen[first : first + len(mine)] == mine  # in one piece
        assert len({(total, unit) for _, _, total, unit in mine}) == 1
        assert (mine[0][1], mine[-1][1]) == (0, mine[0][2])
        assert all(a[1] <= b[1] for a, b in pairwise(mine))
    return seen


def stages(seen: Told) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys((stage, total, unit) for stage, _, total, unit in seen))


def test_a_merge_counts_every_byte_and_verifies_in_sight(tiny: Path, tmp_path: Path) -> None:
    base, out = tiny / "base.safetensors", tmp_path / "m.safetensors"
    seen = told(lambda p: ak.merge(base, [tiny / LORA], output=out, verify=True, progress=p))
    size = out.stat().st_size
    header = 8 + int.from_bytes(out.read_bytes()[:8], "little")
    assert stages(seen) == [
        ("merging", size, "bytes"),
        ("syncing", 1, "outputs"),
        ("verifying", size - header, "bytes"),
    ]
    assert len(seen) > 100


def test_a_second_pass_is_a_stage_of_its_own(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    with ak.open(tiny / LORA) as style:
        seen = told(lambda p: style.resize(error=0.3, verify=True, output=out, progress=p))
    names = [stage for stage, _, _ in stages(seen)]
    assert names == ["fitting", "choosing", "cutting", "writing", "verifying"]
    assert ("writing", out.stat().st_size, "bytes") in stages(seen)
    assert ("fitting", 104, "modules") in stages(seen)


def test_an_extraction_tells_its_stages(tiny: Path, tmp_path: Path) -> None:
    base, tuned, out = tiny / "base.safetensors", tiny / "tuned.safetensors", tmp_path / "e.st"
    options = {"only": "unet.mid_block.*", "output": out, "verify": True}
    seen = told(lambda p: ak.extract(base, tuned, size="50KB", algo="auto", progress=p, **options))
    names = [stage for stage, _, _ in stages(seen)]
    assert names == ["reading", "fitting", "choosing", "refitting", "writing", "verifying"]
    assert ("writing", out.stat().st_size, "bytes") in stages(seen)


def test_copies_files_and_jobs_are_counted_too(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    with ak.open(tiny / LORA) as style:
        seen = told(lambda p: style.save(out, progress=p))
    assert stages(seen) == [("writing", out.stat().st_size, "bytes")]
    seen = told(lambda p: ak.inspect(tiny / LORA, tiny / LOKR, progress=p))
    assert stages(seen) == [("reading", 2, "files")]
    verb = ops.resize.VERB
    options = ops.resize.Options(rank=1, output=tmp_path / "small")
    seen = told(lambda p: run_many(verb, [tiny / LORA, tiny / LOKR], options, progress=p))
    assert stages(seen) == [("resizing", 2, "files")]
    recipe = tmp_path / "recipe.toml"
    job = f'[[job]]\ncommand = "resize"\nadapter = "{(tiny / LORA).as_posix()}"\nrank = 1\n'
    recipe.write_text(f'{job}output = "1.safetensors"\n{job}output = "2.safetensors"\n')
    plan = ops.batch.plan(recipe, ops.batch.Options(jobs=0))
    seen = told(lambda p: ops.batch.run(plan, p))
    assert seen[0] == ("running", 0, 2, "jobs")


def test_unchanged_files_of_a_folder_are_counted(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "folder"
    adaptkit("merge", tiny / "base.safetensors", tiny / LORA, "--layout", "folder", "-o", base)
    seen = told(
        lambda p: ak.merge(base, [tiny / LORA], output=tmp_path / "m", skip="te", progress=p)
    )
    assert [stage for stage, _, _ in stages(seen)] == ["copying", "merging", "syncing"]


def test_off_a_terminal_a_line_is_said_even_while_nothing_gets_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "SECONDS", 0.05)
    with live.shown("merging") as progress:
        time.sleep(0.08)
        progress("verifying", 0, 2_000_000, "bytes")
        progress("verifying", 1_000_000, 2_000_000, "bytes")
        time.sleep(0.15)
        progress("verifying", 0, 7, "files")
        time.sleep(0.08)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "merging: begins"
    half = r"verifying: 1\.0 MB of 2\.0 MB, \d+\.\d [kM]B/s, 0:00 left"
    assert sum(re.fullmatch(half, line) is not None for line in lines) >= 2
    assert lines[-1] == "verifying, pass 2: 0 of 7 files"


SHOWN = """
from adaptkit.cli.show.live.stages import shown
with shown("merging") as progress:
    for stage, unit in (("merging", "bytes"), ("syncing", "outputs"), ("verifying", "bytes")):
        for done in (0, 1_000_000, 2_000_000):
            progress(stage, done, 2_000_000, unit)
"""


@pytest.mark.skipif(os.name == "nt", reason="a pseudo-terminal")
def test_a_terminal_shows_one_line_for_each_stage() -> None:
    import pty

    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen([sys.executable, "-c", SHOWN], stderr=theirs) as process:
        os.close(theirs)
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        assert process.wait() == 0
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    for stage in ("merging", "verifying"):
        whole = rf"{stage} +━+ 2\.0 MB of 2\.0 MB, \d+\.\d+ [kMG]?B/s"
        assert any(re.match(whole, line) for line in lines), lines
    assert any(re.match(r"syncing +━+ 2000000 of 2000000 outputs", line) for line in lines), lines


def test_a_log_file_keeps_the_stages_and_the_error(tiny: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "run.log", tmp_path / "r.safetensors"
    command = ("resize", tiny / LORA, "--size", "40KB", "-o", out, "--log-file", log)
    assert adaptkit(*command).returncode == 0
    assert adaptkit(*command, "-q").returncode == 1  # the output exists
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in lines)
    said = [line.split(" INFO ", 1)[1] for line in lines]
    assert said[0].startswith("adaptkit resize")
    assert "resize: fitting, 104 modules" in said
    assert any(re.fullmatch(r"resize: fitting, 104 of 104 modules in \d\.\d s", s) for s in said)
    assert f"resize: wrote {out}, {out.stat().st_size} bytes" in said
    assert said[-1].startswith("error: ")
    assert "exists" in said[-1]
    refused = adaptkit("inspect", tiny / LORA, "--log-file", tmp_path / "no" / "x.log")
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr


def test_the_guide_names_every_stage() -> None:
    page = adaptkit("help", "python").stdout
    assert [stage for stage in STAGES if f"`{stage}`" not in page] == []
