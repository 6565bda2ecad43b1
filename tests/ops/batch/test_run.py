"""batch: what a recipe may say and what it may not, that nothing is done twice, and that no failure takes others with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adaptkit.errors import (
    AdaptkitError,
    CannotWrite,
    CorruptFile,
    NoSuchName,
    NothingToDo,
    WrongUsage,
)
from adaptkit.ops import batch, merge
from adaptkit.ops.batch.log import Ledger
from adaptkit.ops.batch.output_names import filled, stem
from adaptkit.ops.batch.recipe import Job, load
from adaptkit.ops.batch.run import CHANGED
from adaptkit.ops.batch.values import Reader
from adaptkit.ops.batch.workers import Here, Processes, WorkerProcess
from adaptkit.ops.merge.run import _groups
from adaptkit.ops.merge.steps import combined
from adaptkit.ops.verb import verb, verbs

HERE = batch.Options(jobs=0)
GOING = batch.Options(jobs=0, keep_going=True)
RESIZE = """
[[matrix]]
command = "resize"
adapter = ["lora-kohya.safetensors", "lora-comfy.safetensors"]
rank = [1, 2]
output = "out/{adapter}-{rank}.safetensors"
"""
MERGE = """
[[matrix]]
command = "merge"
base = "base.safetensors"
adapters = "tucker-kohya.safetensors"
strengths = [%s]
output = "out/{adapter}-{strength}.safetensors"
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    for file in tiny.glob("*.safetensors"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def jobs(folder: Path, text: str) -> tuple[Job, ...]:
    return load(recipe(folder, text))


def run(path: Path, options: batch.Options = HERE, **more: Any) -> batch.Report:
    return batch.run(batch.plan(path, options), **more)


def statuses(report: batch.Report) -> str:
    return "".join(result.status[0] for result in report.results)


def events(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in Path(f"{path}.log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


class TestRecipe:
    def test_a_job(self, tmp_path: Path) -> None:
        (job,) = jobs(
            tmp_path,
            '[[job]]\ncommand = "merge"\nbase = "b.ckpt"\nadapters = ["x.safetensors:0.8", "y.safetensors"]\n'
            'strength = 0.5\nblocks = "te=0"\nmemory = "64MiB"\ndtype = "fp16"\noutput = "o/{base}-{adapter}.st"\n',
        )
        assert (job.number, job.command, job.place) == (1, "merge", "[[job]] 1 (line 1)")
        assert [(i.role, i.path, i.strength) for i in job.inputs] == [
            ("base", tmp_path / "b.ckpt", None),
            ("adapter", tmp_path / "x.safetensors", 0.4),
            ("adapter", tmp_path / "y.safetensors", 0.5),
        ]
        assert job.options == {
            "blocks": ("te=0",),
            "memory": 64 << 20,
            "dtype": "fp16",
            "output": tmp_path / "o" / "b-x+y.st",
        }
        assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job

    def test_a_matrix_is_the_product_of_its_lists_the_last_the_fastest(
        self, tmp_path: Path
    ) -> None:
        found = jobs(
            tmp_path,
            '[[matrix]]\ncommand = "merge"\nbases = ["a.ckpt", "b.ckpt"]\nadapters = ["x.pt", ["x.pt:0.5", "y.pt:2"]]\n'
            'strengths = [-1, 0.25]\nblocks = [["te=0"], ["te=0", "unet=0.5"]]\noutput = "{number}_{base}_{adapter}_{strength}"',
        )
        assert len(found) == 16
        assert [job.output.name for job in found[::2]] == [
            "1_a_x_-1",
            "3_a_x_0.25",
            "5_a_x+y_-0.5+-2",
            "7_a_x+y_0.125+0.5",
            "9_b_x_-1",
            "11_b_x_0.25",
            "13_b_x+y_-0.5+-2",
            "15_b_x+y_0.125+0.5",
        ]
        assert {job.options["blocks"] for job in found} == {("te=0",), ("te=0", "unet=0.5")}
        assert found[1].place == "[[matrix]] 1 (line 1), 2 of 16"

    def test_globs_pass_over_hidden_files_and_what_was_made(self, tmp_path: Path) -> None:
        for name in ("b.pt", "a.pt", ".c.pt", "made.pt", "d[1].pt"):
            (tmp_path / name).touch()
        text = '[[matrix]]\ncommand = "combine"\nadapters = "%s"\noutput = "o/{adapter}{strength}"'
        found = load(recipe(tmp_path, text % "*.pt:0.5"), {tmp_path / "made.pt"})
        assert [(job.inputs[0].path.name, job.output.name) for job in found] == [
            ("a.pt", "a0.5"),
            ("b.pt", "b0.5"),
            ("d[1].pt", "d[1]0.5"),
        ]
        (literal,) = load(recipe(tmp_path, text % "d[1].pt"))
        assert literal.inputs[0].path.name == "d[1].pt"
        with pytest.raises(WrongUsage, match=r"nothing matches adapter = '\*.bin'"):
            load(recipe(tmp_path, text % "*.bin"))

    def test_a_relative_recipe_and_its_globs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.pt").touch()
        recipe(
            tmp_path / "in",
            '[[matrix]]\ncommand = "resize"\nadapter = "*.pt"\nrank = 1\noutput = "../{adapter}.st"',
        )
        monkeypatch.chdir(tmp_path)
        (job,) = load(Path("in/recipe.toml"))
        assert (job.inputs[0].path, job.output) == (Path("in/a.pt"), Path("a.st"))

    def test_defaults_give_way_to_what_is_nearer(self, tmp_path: Path) -> None:
        head = (
            '[defaults]\ndtype = "fp16"\nrank = 8\nconv_rank = 4\noutput = "{number}"\n'
            '[defaults.resize]\nadapter = "a.pt"\n[defaults.convert]\nto = "peft"\nadapter = "a.pt"\n'
        )
        found = jobs(
            tmp_path,
            head
            + '[[job]]\ncommand = "resize"\n[[job]]\ncommand = "resize"\nsize = "1MB"\ndtype = "keep"\n'
            '[[job]]\ncommand = "convert"\nhost = "comfyui"\n'
            '[[job]]\ncommand = "merge"\nbase = "b"\nadapter = "c"\n',
        )
        options = [{k: v for k, v in job.options.items() if k != "output"} for job in found]
        assert options == [
            {"dtype": "fp16", "rank": 8, "conv_rank": 4},
            {"dtype": "keep", "size": 1_000_000},
            {"dtype": "fp16", "rank": 8, "conv_rank": 4, "host": "comfyui"},
            {"dtype": "fp16"},
        ]

    @pytest.mark.parametrize("command", verbs())
    def test_every_option_of_every_command_can_be_read(self, command: str, tmp_path: Path) -> None:
        reader = Reader(tmp_path, "here", command)
        values = {
            int: 3,
            float: 0.5,
            bool: True,
            str: "auto",
            Path: "x",
            tuple[str, ...]: ["a", "b"],
        }
        special = {"dtype": "bf16"}
        options = verb(command).options
        for name, kind in verb(command).kinds.items():
            value = reader.option(name, special.get(name, values[kind]))
            assert getattr(options(**{name: value}), name) == value
            with pytest.raises(WrongUsage, match=f"^here: {name} must be "):
                reader.option(name, {"a": "table"})

    @pytest.mark.parametrize(
        ("text", "error", "words"),
        [
            ("", NothingToDo, "no [[job]]"),
            ("a = [", CorruptFile, "not valid TOML"),
            ("[[jobs]]\n", NoSuchName, "unknown table 'jobs'"),
            ("job = 3\n", WrongUsage, "`job` is not a list of tables"),
            ("[defaults]\nrnak = 1\n", NoSuchName, "[defaults]: unknown option 'rnak'"),
            ("[defaults.resiz]\nrank = 1\n", NoSuchName, "[defaults]: unknown command 'resiz'"),
            ("[defaults.merge]\nrank = 1\n", NoSuchName, "[defaults.merge]: unknown option 'rank'"),
            ("[[job]]\nrank = 1\n", WrongUsage, "it has no command"),
            ('[[job]]\ncommand = "merg"\n', NoSuchName, "unknown command 'merg'"),
            ('[[job]]\ncommand = "resize"\nadapter = "a"\n', WrongUsage, "it has no output"),
            ('[[job]]\ncommand = "resize"\noutput = "a"\n', WrongUsage, "resize requires adapter"),
            (
                '[[job]]\ncommand = "convert"\nadapter = "b"\noutput = "a"\n',
                WrongUsage,
                "it has no target format",
            ),
            (
                '\n\n[[job]]\ncommand = "resize"\nrnk = 1\n',
                NoSuchName,
                "[[job]] 1 (line 3): unknown option 'rnk'",
            ),
            (
                '[[job]]\ncommand = "resize"\nadapter = "a"\nadapters = "b"\n',
                WrongUsage,
                "are the same",
            ),
            (
                '[[job]]\ncommand = "resize"\nadapter = 3\noutput = "a"\n',
                WrongUsage,
                "adapter must be a path, got 3",
            ),
            (
                '[[matrix]]\ncommand = "resize"\nadapter = []\noutput = "a"\n',
                WrongUsage,
                "adapter is an empty list",
            ),
        ],
    )
    def test_what_is_refused(
        self, text: str, error: type[AdaptkitError], words: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=re.escape(words)) as caught:
            jobs(tmp_path, text)
        assert str(tmp_path / "recipe.toml") in str(caught.value)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("rank = true", "rank must be an integer, got true"),
            ("rank = 1.5", "rank must be an integer, got 1.5"),
            ("rank = [1, 2]", "rank must be an integer, got [1, 2]"),
            (
                'size = "5 furlongs"',
                'size must be a size such as 500KB, 64MB, 1.5GB or 64MiB, got "5 furlongs"',
            ),
            ("error = nan", "error must be a number, got nan"),
            ('overwrite = "yes"', 'overwrite must be true or false, got "yes"'),
            ('dtype = "fp8"', 'dtype must be one of keep, fp32, fp16, bf16, got "fp8"'),
            ("only = [1]", "only must be a list of strings, got [1]"),
        ],
    )
    def test_wrong_types_are_named_with_their_place(
        self, line: str, words: str, tmp_path: Path
    ) -> None:
        with pytest.raises(WrongUsage, match=re.escape(f"[[job]] 2 (line 5): {words}")):
            jobs(
                tmp_path,
                '[[job]]\ncommand = "resize"\nadapter = "a"\noutput = "b"\n'
                f'[[job]]\ncommand = "resize"\nadapter = "a"\noutput = "c"\n{line}\n',
            )

    def test_outputs_that_meet_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(WrongUsage, match=r"1 of 2 and .* 2 of 2 both write") as caught:
            jobs(tmp_path, RESIZE.replace("-{rank}", "").replace(', "lora-comfy.safetensors"', ""))
        assert "{strength}" in str(caught.value.hint)
        with pytest.raises(WrongUsage, match="both write"):  # one file on Windows and macOS
            jobs(
                tmp_path,
                RESIZE.replace("{adapter}-{rank}", "{number}a")
                + RESIZE.replace("{adapter}-{rank}", "1A"),
            )

    def test_a_job_on_what_another_writes_is_refused(self, tmp_path: Path) -> None:
        text = '[[job]]\ncommand = "resize"\nadapter = "%s"\nrank = 1\noutput = "%s"\n'
        with pytest.raises(
            WrongUsage, match=r"\[\[job\]\] 2 .* reads what \[\[job\]\] 1 .* writes"
        ):
            jobs(tmp_path, text % ("a", "b") + text % ("x/../b", "c"))
        with pytest.raises(WrongUsage, match="reads what"):
            jobs(tmp_path, text % ("a", "a"))

    def test_templates(self) -> None:
        names = {
            "base": "a/b",
            "strength": 0.30000000000000004,
            "rank": None,
            "number": 7,
            "only": (),
        }
        assert (
            filled("{{{base}}}-{strength}-{strength:.3f}-{number:03}", names, "")
            == "{a_b}-0.3-0.300-007"
        )
        with pytest.raises(NoSuchName, match=r"unknown name '\{bas\}'"):
            filled("{bas}", names, "")
        for text in ("{rank}", "{only}", "{", "{number:q}", "{base.__class__}", "{}"):
            with pytest.raises((WrongUsage, NoSuchName)):
                filled(text, names, "")
        names_of = [
            stem(Path(p))
            for p in ("m/style.v2.safetensors", "f/style.v2", "x.safetensors.index.json", "a.ckpt")
        ]
        assert names_of == ["style.v2", "style.v2", "x", "a"]


class TestRuns:
    def test_the_result_is_that_of_the_command(self, folder: Path) -> None:
        report = run(recipe(folder, MERGE % "-0.5"))
        alone = folder / "alone.safetensors"
        options = merge.Options(output=alone)
        merge.run(
            merge.plan(
                folder / "base.safetensors", [(folder / "tucker-kohya.safetensors", -0.5)], options
            )
        )
        assert (folder / "out" / "tucker-kohya--0.5.safetensors").read_bytes() == alone.read_bytes()
        assert (report.count("done"), report.results[0].bytes) == (1, alone.stat().st_size)

    def test_every_command(self, folder: Path) -> None:
        path = recipe(
            folder,
            '[defaults]\noutput = "out/{command}.safetensors"\n'
            '[[job]]\ncommand = "extract"\nbase = "base.safetensors"\ntuned = "tuned.safetensors"\nrank = 2\n'
            '[[job]]\ncommand = "convert"\nadapter = "lora-kohya.safetensors"\nto = "comfy"\n'
            '[[job]]\ncommand = "combine"\nadapters = ["lora-kohya.safetensors", "lokr-kohya.safetensors:-1"]\nrank = 2\n'
            '[[job]]\ncommand = "resize"\nadapter = "lora-kohya.safetensors"\nsize = "30KB"\n',
        )
        report = run(path)
        assert statuses(report) == "dddd", report.to_dict()["failures"]
        assert all(load_file(folder / "out" / f"{job.command}.safetensors") for job in load(path))
        assert statuses(run(path)) == "ssss"

    def test_only_what_changed_is_done_again(self, folder: Path) -> None:
        path = recipe(folder, RESIZE)
        first, second = (folder / "out" / f"lora-kohya-{rank}.safetensors" for rank in (1, 2))
        assert statuses(run(path)) == "dddd"
        assert statuses(run(path)) == "ssss"
        before = first.read_bytes()
        first.unlink()
        second.write_bytes(b"something else")
        assert statuses(run(path)) == "ddss"
        assert first.read_bytes() == before
        shutil.copyfile(folder / "lora-lycoris.safetensors", folder / "lora-comfy.safetensors")
        assert statuses(run(path)) == "ssdd"
        recipe(folder, RESIZE.replace("[1, 2]", "[1, 2]\nonly = 'unet'"))
        assert statuses(run(path)) == "dddd"
        recipe(
            folder,
            RESIZE.replace("[1, 2]", "[1, 2]\nonly = 'unet'\nmemory = '1GB'\ndevice = 'cpu'"),
        )
        assert statuses(run(path)) == "ssss", "neither changes what is written"

    def test_contents_count_not_names_and_times(self, folder: Path) -> None:
        path = recipe(folder, RESIZE)
        run(path)
        os.utime(folder / "lora-kohya.safetensors", (1e9, 1e9))
        assert statuses(run(path)) == "ssss"
        assert "lora-kohya" in (folder / "recipe.toml.hashes.jsonl").read_text(encoding="utf-8")
        moved = folder.rename(folder.with_name("elsewhere"))
        assert statuses(run(moved / "recipe.toml")) == "ssss"

    def test_hashes_are_read_from_the_side_file(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe(folder, RESIZE)
        for file in folder.glob("lora-*"):
            os.utime(
                file, (1e9, 1e9)
            )  # younger files are hashed each time: they may change within one tick
        run(path)
        monkeypatch.setattr(
            "adaptkit.ops.batch.log.sha256", lambda path: pytest.fail(f"{path} was hashed again")
        )
        assert statuses(run(path)) == "ssss"

    def test_a_foreign_file_is_not_replaced(self, folder: Path) -> None:
        path = recipe(folder, RESIZE)
        (folder / "out").mkdir()
        foreign = folder / "out" / "lora-kohya-2.safetensors"
        foreign.write_bytes(b"mine")
        report = run(path, GOING)
        assert statuses(report) == "dfdd"
        assert "this recipe did not write it" in str(report.failures[0].outcome.error)
        assert foreign.read_bytes() == b"mine"
        assert statuses(run(path, batch.Options(jobs=0, overwrite=True))) == "sdss"

    def test_an_output_that_a_killed_run_began_is_the_recipes_own(self, folder: Path) -> None:
        path = recipe(folder, RESIZE)
        plan = batch.plan(path, HERE)
        plan.ledger.start(plan.jobs[0])
        plan.jobs[0].output.parent.mkdir()
        plan.jobs[0].output.write_bytes(b"whole, but the log was never told")
        with (folder / "recipe.toml.log.jsonl").open("a") as log:
            log.write('{"event": "do')  # the machine lost power
        assert statuses(run(path)) == "dddd"
        assert statuses(run(path)) == "ssss"

    def test_the_first_failure_stops_the_rest(self, folder: Path) -> None:
        (folder / "lora-kohya.safetensors").write_bytes(b"broken")
        report = run(recipe(folder, RESIZE))
        assert (statuses(report), report.not_run) == ("f", 3)
        report = run(recipe(folder, RESIZE), GOING)
        assert (statuses(report), report.not_run) == ("ffdd", 0)

    def test_the_log_says_what_was_done_from_what(self, folder: Path) -> None:
        path = recipe(folder, MERGE % "0.5" + RESIZE.replace("lora-comfy", "absent"))
        run(path, GOING)
        log = events(path)
        assert [record["event"] for record in log] == ["start", "done"] * 3 + ["failed"] * 2
        done = log[1]
        assert done["output"] == "out/tucker-kohya-0.5.safetensors"
        assert [(i["role"], i["path"], i.get("strength")) for i in done["inputs"]] == [
            ("base", "base.safetensors", None),
            ("adapter", "tucker-kohya.safetensors", 0.5),
        ]
        assert all(re.fullmatch("[0-9a-f]{64}", item["sha256"]) for item in done["inputs"])
        assert done["report"]["tensors_changed"] > 0
        assert "absent.safetensors: no such file" in log[-1]["error"]

    def test_an_input_that_changes_meanwhile_fails_its_job(self, folder: Path) -> None:
        class Meddling(Here):
            def run(self, jobs: Any) -> Any:
                for job, outcome in super().run(jobs):
                    job.inputs[0].path.touch()
                    yield job, outcome

        report = run(recipe(folder, RESIZE), GOING, engine=Meddling())
        assert statuses(report) == "ffff"
        assert report.failures[0].outcome.error == CHANGED

    def test_jobs_on_one_base_follow_one_another(self, folder: Path) -> None:
        plan = batch.plan(recipe(folder, ALTERNATING), HERE)
        assert [job.number for job in plan.jobs] == [1, 3, 2, 4, 5]
        assert [len(group) for group in plan.groups] == [2, 2, 1]

    def test_folders_are_hashed_by_what_is_in_them(self, folder: Path) -> None:
        inner = folder / "adapter"
        inner.mkdir()
        shutil.copyfile(folder / "lora-peft.safetensors", inner / "adapter_model.safetensors")
        ledger = Ledger(folder / "recipe.toml")
        first = ledger.content(inner)
        (inner / ".hidden").touch()
        assert ledger.content(inner) == first
        (inner / "adapter_config.json").write_text("{}")
        assert ledger.content(inner) != first

    def test_a_log_that_cannot_be_written_is_said(self, folder: Path) -> None:
        (folder / "recipe.toml.log.jsonl").mkdir()
        with pytest.raises(AdaptkitError, match=r"log\.jsonl"):
            run(recipe(folder, RESIZE))
        assert issubclass(CannotWrite, AdaptkitError)


ALTERNATING = """
[defaults]
output = "{number}"
[[job]]
command = "merge"
base = "a.ckpt"
adapter = "x"
[[job]]
command = "merge"
base = "b.ckpt"
adapter = "x"
[[job]]
command = "extract"
base = "./a.ckpt"
tuned = "x"
[[job]]
command = "merge"
base = "b.ckpt"
adapter = "y"
[[job]]
command = "resize"
adapter = "y"
rank = 1
"""


class TestPreview:
    def test_it_writes_nothing(self, folder: Path) -> None:
        path = recipe(folder, MERGE % "0.5, 1" + RESIZE.replace("lora-comfy", "absent"))
        before = sorted(folder.rglob("*"))
        found = batch.preview(batch.plan(path, batch.Options(jobs=2)))
        assert sorted(folder.rglob("*")) == before
        record = found.to_dict()
        assert (record["jobs"], record["to_do"], record["failed"], record["skipped"]) == (
            6,
            4,
            2,
            0,
        )
        assert record["bytes_in"] == sum(plan["bytes_in"] for plan in found.plans)
        assert record["bytes_out"] > 2_500_000
        assert record["open_sizes"] == 2
        assert record["peak_memory"] == 2 * found.plans[0]["peak_memory"]
        assert found.plans[0]["output"] == str(folder / "out" / "tucker-kohya-0.5.safetensors")
        assert "details" not in record["plans"][0]
        assert "details" in found.to_dict(details=True)["plans"][0]

    def test_it_leaves_out_what_is_done(self, folder: Path) -> None:
        path = recipe(folder, RESIZE)
        run(path)
        (folder / "out" / "lora-kohya-1.safetensors").unlink()
        found = batch.preview(batch.plan(path, HERE))
        assert (found.skipped, [plan["job"] for plan in found.plans]) == (3, [1])


@pytest.mark.skipif(os.name == "nt", reason="signals")
class TestWorkers:
    def test_a_killed_worker_fails_its_job_alone(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send = WorkerProcess.send
        left: list[Path] = []

        def deadly(worker: WorkerProcess, bundle: tuple[Job, ...]) -> None:
            """Merges into one base come in a bundle, and job by job after its worker has died."""
            for job in bundle:
                if job.number == 2:
                    worker.process.send_signal(signal.SIGSTOP)
                    left.append(
                        job.output.with_name(f".{job.output.name}.{worker.process.pid}-00.part")
                    )
                    left[-1].parent.mkdir(exist_ok=True)
                    left[-1].touch()
                    worker.process.kill()
            send(worker, bundle)

        monkeypatch.setattr(WorkerProcess, "send", deadly)
        path = recipe(folder, MERGE % "0.1, 0.2, 0.3")
        report = run(path, GOING, engine=Processes(1))
        assert statuses(report) == "dfd"
        assert "worker process was killed (SIGKILL)" in str(report.failures[0].outcome.error)
        assert report.failures[0].job.number == 2
        assert len(left) == 2
        assert not any(path.exists() for path in left)
        monkeypatch.undo()
        assert statuses(run(path)) == "sds"
        first = folder / "out" / "tucker-kohya-0.1.safetensors"
        by_worker = first.read_bytes()
        first.unlink()
        assert statuses(run(path)) == "dss"
        assert first.read_bytes() == by_worker, "as in this process"


class TestTogether:
    """Merges into one base are made in one pass."""

    ADAPTERS = ("lora-kohya", "lokr-kohya", "lokr-factored-kohya", "tucker-kohya", "full-kohya")

    def plans(self, folder: Path, **options: Any) -> list[merge.Plan]:
        strengths = (0.5, -1.0, 0.25, 1.0, 0.1)
        return [
            merge.plan(
                folder / "base.safetensors",
                [(folder / f"{name}.safetensors", strength)],
                merge.Options(output=folder / f"{name}-{strength}.safetensors", **options),
            )
            for name, strength in zip(self.ADAPTERS, strengths, strict=True)
        ]

    @pytest.mark.parametrize("dtype", ["keep", "bf16"])
    def test_each_is_the_merge_by_itself(self, folder: Path, dtype: str) -> None:
        reports = merge.run_together(self.plans(folder, dtype=dtype))
        together = [report.output.read_bytes() for report in reports]
        alone = [merge.run(plan) for plan in self.plans(folder, dtype=dtype, overwrite=True)]
        assert [report.output.read_bytes() for report in alone] == together
        for one, other in zip(reports, alone, strict=True):
            assert {**one.to_dict(), "seconds": 0} == {**other.to_dict(), "seconds": 0}

    def test_the_base_is_read_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plans = self.plans(folder)
        read: list[str] = []
        for plan in plans:
            source = plan.base.source
            monkeypatch.setattr(
                source, "read", lambda name, inner=source.read: (read.append(name), inner(name))[1]
            )
        merge.run_together(plans)
        touched = {one.name for plan in plans for one in plan.computed}
        assert sorted(read) == sorted(touched)
        assert sum(len(plan.computed) for plan in plans) > len(touched)

    def test_as_many_at_once_as_fit_in_memory(self, folder: Path) -> None:
        plans = self.plans(folder)
        steps = combined(plans)
        least, most = (
            max(step.bytes for plan in plans for step in plan.steps),
            max(step.bytes for step in steps),
        )
        assert least < most
        assert [len(group) for group in _groups(plans)] == [len(plans)]
        for memory, count in ((most, 1), (most - 1, 2)):
            groups = list(_groups(self.plans(folder, overwrite=True, memory=memory)))
            assert sum(map(len, groups)) == len(plans)
            assert len(groups) == count

    def test_one_that_fails_fails_alone(self, folder: Path) -> None:
        path = recipe(folder, MERGE % "0.1, 1e30, 0.2" + EXTRA)
        report = run(path, GOING)
        assert statuses(report) == "dfdf"
        assert "does not fit float16" in str(report.failures[0].outcome.error)
        assert "Stable Diffusion XL" in str(report.failures[1].outcome.error)
        assert not list((folder / "out").glob(".*"))

    def test_all_of_a_bundle_go_to_one_worker(self, folder: Path) -> None:
        got: list[int] = []

        class Counting(Here):
            def run(self, bundles: Any) -> Any:
                def counted() -> Any:
                    for bundle in bundles:
                        got.append(len(bundle))
                        yield bundle

                return super().run(counted())

        run(recipe(folder, MERGE % "0.1, 0.2, 0.3" + RESIZE), engine=Counting())
        assert got == [3, 1, 1, 1, 1]


EXTRA = """
[[job]]
command = "merge"
base = "base.safetensors"
adapter = "sdxl.safetensors"
output = "out/wrong.safetensors"
"""
