"""Many files at once: folders and globs in convert, resize and inspect; a card; failures as JSON; closed pipes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.ops.inspect import folder as folders
from tests.cli.test_cli import adaptkit, refused

LORA, LOKR = "lora-kohya.safetensors", "lokr-kohya.safetensors"


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """Adapters of equal names in two folders, a PEFT folder, a checkpoint and a broken file."""
    made = tmp_path / "loras"
    for name, source in (("run1", LORA), ("run2", LOKR)):
        (made / name).mkdir(parents=True)
        shutil.copy(tiny / source, made / name / "last.safetensors")
    adaptkit("convert", tiny / LORA, "--to", "peft", "--only", "unet", "-o", made / "peft")
    (made / "broken.safetensors").write_bytes(b"no header")
    shutil.copy(tiny / "base.safetensors", made)
    return made


GOOD = {"run1/last.safetensors", "run2/last.safetensors", "peft.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", ["convert", "resize"])
def test_a_folder_is_written_to_a_folder_and_one_failure_stops_no_other(
    folder: Path, verb: str
) -> None:
    rule = ["--for", "comfyui"] if verb == "convert" else ["--rank", "1"]
    output = folder.parent / "out"
    done = adaptkit(verb, folder, *rule, "-o", output)
    assert done.returncode == 1  # the broken file
    assert done.stderr.count("error:") == 1
    assert "broken.safetensors" in done.stderr
    assert "3 of 4 written" in done.stderr  # the checkpoint is passed over
    peft = {"peft/adapter_model.safetensors", "peft/adapter_config.json"}
    assert names(output) == (GOOD if verb == "convert" else GOOD - {"peft.safetensors"} | peft)
    assert len(done.stdout.splitlines()) == 3
    # once more: outputs exist, which is told for each
    done = adaptkit(verb, folder, *rule, "-o", output)
    assert done.stderr.count("error:") == 4
    assert done.stderr.count("already exists") >= 2
    assert done.stdout == ""
    done = adaptkit(verb, folder, *rule, "-o", output, "--suffix", "x", "--json")
    records = json.loads(done.stdout)["files"]
    assert [record["error"]["type"] for record in records if "error" in record] == ["CorruptFile"]
    assert sum("relative_error" in record for record in records) == 3
    assert (output / "run1" / "last-x.safetensors").is_file()


def test_each_output_is_that_of_its_file_alone(folder: Path) -> None:
    output = folder.parent / "out"
    done = adaptkit("resize", folder / "run1", folder / "run2", "--size", "30KB", "-o", output)
    assert done.returncode == 0, done.stderr
    for name, run in (("a", "run1"), ("b", "run2")):
        alone, together = (
            folder.parent / name / "last.safetensors",
            output / run / "last.safetensors",
        )
        alone.parent.mkdir()
        adaptkit("resize", folder / run / "last.safetensors", "--size", "30KB", "-o", alone)
        assert together.read_bytes() == alone.read_bytes()
        assert alone.stat().st_size <= 30_000
    # two files of one name cannot both be written
    files = [folder / run / "last.safetensors" for run in ("run1", "run2")]
    done = adaptkit("convert", *files, "--to", "comfy", "-o", folder.parent / "p")
    assert "already exists" in done.stderr
    assert "1 of 2 written" in done.stderr


def test_without_a_folder_outputs_lie_beside_their_inputs(folder: Path) -> None:
    done = adaptkit("resize", str(folder / "run*" / "*.safetensors"), "--rank", "1")
    assert done.returncode == 0, done.stderr
    assert (folder / "run1" / "last-rank1.safetensors").is_file()
    assert (folder / "run2" / "last-rank1.safetensors").is_file()
    done = adaptkit("convert", folder / "nothing here", folder / "run1", "--to", "comfy")
    assert done.returncode == 1
    assert (folder / "run1" / "last-comfy.safetensors").is_file()
    file = folder / "run1" / "last.safetensors"
    refused(adaptkit("convert", folder, "--to", "comfy", "-o", file), "this is a file")


def test_a_folder_is_a_table_of_relative_names(folder: Path) -> None:
    done = adaptkit("inspect", folder)
    assert done.returncode == 1
    rows = done.stdout.splitlines()
    shown = [row.split()[-1] for row in rows[1:]]
    assert shown == ["base.safetensors", "peft", "run1/last.safetensors", "run2/last.safetensors"]
    listed = [
        report["path"]
        for report in json.loads(adaptkit("inspect", folder, "--json").stdout)["files"]
    ]
    assert len(listed) == 5


def test_it_is_sorted_selected_and_written_as_csv(folder: Path) -> None:
    def rows(*options: str) -> list[dict[str, str]]:
        done = adaptkit("inspect", folder, "--csv", *options)
        return [row for row in csv.DictReader(io.StringIO(done.stdout)) if not row["error"]]

    sizes = [int(row["bytes"]) for row in rows("--sort", "size")]
    assert sizes == sorted(sizes, reverse=True)
    assert [row["path"] for row in rows("--where", "algorithm=lokr")] == ["run2/last.safetensors"]
    assert [row["path"] for row in rows("--where", "format=peft", "--where", "family=SD*")] == [
        "peft"
    ]
    assert len(rows("--where", "kind=adapter")) == 3
    assert [row["path"] for row in rows("--sort", "name")] == sorted(row["path"] for row in rows())
    assert {row["path"] for row in rows("--sort", "date")} == {row["path"] for row in rows()}
    refused(adaptkit("inspect", folder, "--where", "colour=blue"), "unknown field", "family")
    refused(adaptkit("inspect", folder, "--where", "sdxl"), "FIELD=VALUE", code=2)


def test_broken_files_are_found(folder: Path) -> None:
    tensors = load_file(folder / "run1" / "last.safetensors")
    tensors.pop(next(key for key in tensors if "lora_down" in key))
    save_file(tensors, folder / "half.safetensors")
    done = adaptkit("inspect", folder, "--where", "problems=error", "--csv")
    found = [row["path"] for row in csv.DictReader(io.StringIO(done.stdout))]
    assert found == ["broken.safetensors", "half.safetensors"]
    assert done.returncode == 1


def seen(log: list[str], some: list[str], options: ops.inspect.Options) -> list[ops.inspect.Report]:
    time.sleep(0.05)  # so that the last job is still waiting when the first file is reached
    log += some
    return [folders._slim(Path(path), options) for path in some]


def test_many_files_are_read_in_processes_with_the_same_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = list(ops.inspect.expand([folder]))
    options = ops.inspect.Options(overview=True)
    counts: list[int] = []
    alone = ops.inspect.survey(paths, options, lambda _, done, *__: counts.append(done))
    assert counts == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(folders, "_TRIED", 2)
    monkeypatch.setattr(folders, "_PAYS", 0.0)
    monkeypatch.setattr(folders, "_WORKERS", 3)
    elsewhere: list[str] = []
    with ThreadPoolExecutor(1) as pool:  # as a process would, and seen from here
        monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda *_: pool)
        monkeypatch.setattr(folders, "_run", lambda some, with_: seen(elsewhere, some, with_))
        shared = ops.inspect.survey(paths, options, lambda _, done, *__: counts.append(done))
    assert elsewhere
    assert counts[6:] == sorted(counts[6:])
    assert counts[-1] == 5
    assert [report.record for report in shared] == [report.record for report in alone]
    monkeypatch.undo()
    monkeypatch.setattr(folders, "_TRIED", 2)
    monkeypatch.setattr(folders, "_PAYS", 0.0)
    together = ops.inspect.survey(paths, options)
    assert [report.record for report in together] == [report.record for report in alone]
    assert [report.error and report.error.hint for report in together] == [
        report.error and report.error.hint for report in alone
    ]


def test_conditions_and_orders_are_checked(folder: Path) -> None:
    with pytest.raises(NoSuchName, match="unknown order"):
        ops.inspect.ordered([], "colour")
    with pytest.raises(WrongUsage, match="FIELD=VALUE"):
        ops.inspect.where([], ["x"])


# --- a model card ---------------------------------------------------------------------------------


def test_a_card_says_what_the_file_says(tiny: Path, tmp_path: Path) -> None:
    path, card = tmp_path / "a.safetensors", tmp_path / "card.md"
    said = {
        "modelspec.title": "Night <b>|</b>",
        "modelspec.trigger_phrase": "nightstyle",
        "ss_steps": "1200",
        "ss_tag_frequency": json.dumps({"a": {"moon": 3, "sky": 9}}),
    }
    save_file(load_file(tiny / LORA), path, metadata=said)
    done = adaptkit("inspect", path, "--card", card)
    assert done.returncode == 0, done.stderr
    text = card.read_text(encoding="utf-8")
    record = ops.inspect.run(path, ops.inspect.Options(hash=True)).record
    for words in ("# Night &lt;b>\\|&lt;/b>", "`nightstyle`", "| steps | 1200 |", "sky, moon"):
        assert words in text
    assert record["sha256"] in text
    assert "| comfyui | yes |" in text
    refused(adaptkit("inspect", path, "--card", card), "already exists")
    refused(adaptkit("inspect", tiny, "--card", card), "describes one file", code=2)
    refused(
        adaptkit("inspect", tiny / "base.safetensors", "--card", tmp_path / "b.md"),
        "one adapter",
        code=2,
    )


# --- failures as JSON, closed pipes ---------------------------------------------------------------


def test_what_a_file_says_moves_no_cursor_and_forges_no_line(tiny: Path, tmp_path: Path) -> None:
    path, card = tmp_path / "a.safetensors", tmp_path / "card.md"
    tensors = load_file(tiny / LORA)
    tensors["evil\x1b[31mkey.lora_up.weight"] = next(iter(tensors.values())).clone()
    evil = "nice\x1b]0;pwned\x07\n  loads in    comfyui: yes"
    tags = json.dumps({"a": {"tag\x1b[2J\nAutoV2 1": 3}})
    save_file(tensors, path, metadata={"modelspec.title": evil, "ss_tag_frequency": tags})
    for arguments in (("metadata", path), ("metadata", path, "-v"), ("inspect", path, "--csv")):
        shown = adaptkit(*arguments).stdout
        assert "\x1b" not in shown
        assert not [line for line in shown.splitlines() if line.strip().startswith("loads in")]
        assert sum(line.strip().startswith("AutoV2") for line in shown.splitlines()) <= 1
    adaptkit("inspect", path, "--card", card)
    assert "\x1b" not in card.read_text(encoding="utf-8")


def test_failures_are_one_json_document(tiny: Path, tmp_path: Path) -> None:
    done = adaptkit("convert", tmp_path / "none.safetensors", "--to", "comfy", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error.keys() == {"type", "message", "hint", "file", "tensor"}
    assert (error["type"], error["file"]) == ("UnreadableFile", str(tmp_path / "none.safetensors"))
    done = adaptkit("resize", tiny / LORA, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "WrongUsage"
    done = adaptkit("convert", tiny / LORA, "--for", "nobody", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["type"]) == (2, "BadParameter")


@pytest.mark.skipif(os.name == "nt", reason="a shell's pipe")
def test_a_reader_that_has_ended_is_no_failure(tiny: Path) -> None:
    script = f'{sys.executable} -m adaptkit inspect {tiny / "base.safetensors"} --keys; echo "code $?" >&2'
    process = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read().strip() == "code 0"
    process.wait()


def test_progress_off_a_terminal_is_a_plain_line_now_and_then(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "resize",
        tiny / LORA,
        "--rank",
        "1",
        "--overwrite",
        "-o",
        tmp_path / "o.safetensors",
    )
    assert "fitting:" not in adaptkit(*arguments).stderr  # too short to say anything
    monkeypatch.setattr("adaptkit.cli.show.live.stages.SECONDS", 0.001)
    assert " of 104 modules" in adaptkit(*arguments).stderr
    assert "fitting:" not in adaptkit(*arguments, "-q").stderr


def test_a_dry_run_of_many_plans_each_and_writes_nothing(folder: Path) -> None:
    output = folder.parent / "small" / "deep"
    command = ("resize", folder, "--size", "30KB", "-o", output)
    planned = adaptkit(*command, "--dry-run")
    assert planned.returncode == 1  # a file is broken
    assert "3 of 4 would be written" in planned.stdout
    assert "broken.safetensors" in planned.stderr
    assert not output.parent.exists()
    document = json.loads(adaptkit(*command, "--dry-run", "--json").stdout)
    promised = {one["output"] for one in document["files"] if "output" in one}
    written = adaptkit(*command)
    assert promised == set(written.stdout.split())
    assert "would be written" not in written.stdout + written.stderr
    again = adaptkit(*command, "--dry-run")
    assert "already exists" in again.stderr
    files = [folder / run / "last.safetensors" for run in ("run1", "run2")]
    twice = adaptkit("resize", *files, "--rank", "1", "-o", folder.parent / "one", "--dry-run")
    assert twice.returncode == 1
    assert "two inputs would be written to it" in twice.stderr
