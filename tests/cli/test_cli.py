"""The command-line contract: streams, exit codes, JSON, refusals. Commands run through `main`, some in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.cli import cli, main
from adaptkit.ops import combine, convert, extract, inspect, merge, resize


def adaptkit(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the command line does with these arguments: in this process, which has torch already, or in one of its own
    where it needs an environment."""
    if environment:
        return process(*arguments, cwd=cwd, **environment)
    command = ["adaptkit", *map(str, arguments)]
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)
    )
    before, code = gc.get_threshold(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            gc.set_threshold(*before)
    shown = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, code, *shown)


def process(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "adaptkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One clear error, no traceback, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 or code == 2
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    assert done.stdout == ""


@pytest.fixture
def pair(tmp_path: Path, tiny: Path) -> Path:
    """A folder with spaces and other scripts in its name, holding base.ckpt, tuned.ckpt and an adapter."""
    folder = tmp_path / "models à côté 模型"
    folder.mkdir()
    for name in ("base.ckpt", "tuned.ckpt", "base.safetensors", "lora-kohya.safetensors"):
        shutil.copy(tiny / name, folder / name)
    return folder


class TestExtract:
    def test_as_written_in_the_contract(self, pair: Path) -> None:
        done = adaptkit("extract", "base.ckpt", "tuned.ckpt", "--algo", "lokr", cwd=pair)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "tuned-lokr.safetensors"
        assert "captured" in done.stderr
        assert (pair / "tuned-lokr.safetensors").exists()
        again = adaptkit("extract", "base.ckpt", "tuned.ckpt", "--algo", "lokr", cwd=pair)
        refused(again, "exists", "--overwrite")
        before = (pair / "tuned-lokr.safetensors").read_bytes()
        assert (
            adaptkit(
                "extract", "base.ckpt", "tuned.ckpt", "--algo", "lokr", "--overwrite", cwd=pair
            ).returncode
            == 0
        )
        assert (pair / "tuned-lokr.safetensors").read_bytes() == before

    def test_json_is_one_document_with_the_contracts_fields(self, pair: Path) -> None:
        done = adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--rank", 4, "--json")
        report = json.loads(done.stdout)
        assert done.stderr == ""
        for name in (
            "adaptkit",
            "command",
            "output",
            "bytes",
            "modules",
            "parameters",
            "relative_error",
            "unused",
            "seconds",
            "details",
        ):
            assert name in report
        assert report["command"] == "extract"
        assert report["bytes"] == Path(report["output"]).stat().st_size
        assert {"module", "algorithm", "rank", "relative_error"} <= report["details"][0].keys()
        assert 0 < report["relative_error"] < 1
        assert report["modules"] == len(report["details"])

    def test_dry_run_writes_nothing(self, pair: Path) -> None:
        before = sorted(pair.iterdir())
        done = adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--dry-run", "--json")
        plan = json.loads(done.stdout)
        assert plan["dry_run"] is True
        assert {"modules", "bytes_in", "bytes_out_at_most", "peak_memory", "details"} <= plan.keys()
        assert sorted(pair.iterdir()) == before
        assert (
            "would write"
            in adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--dry-run").stdout
        )

    def test_quiet_says_only_where(self, pair: Path) -> None:
        done = adaptkit(
            "extract", pair / "base.ckpt", pair / "tuned.ckpt", "-q", "-o", pair / "o.safetensors"
        )
        assert done.stderr == ""
        assert done.stdout.strip() == str(pair / "o.safetensors")

    def test_nothing_differs(self, pair: Path) -> None:
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "base.safetensors"), "nothing differs"
        )
        assert not list(pair.glob("*-lora*"))

    def test_the_note_about_lokr(self, pair: Path) -> None:
        base = load_file(pair / "base.safetensors")
        key = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
        torch.manual_seed(0)
        base[key] = base[key] + (torch.randn(256, 1) @ torch.randn(1, 32)).half()
        save_file(base, pair / "other.safetensors")
        done = adaptkit(
            "extract",
            pair / "base.safetensors",
            pair / "other.safetensors",
            "--algo",
            "lokr",
            "--factor",
            4,
        )
        assert "note: This LoKr keeps only" in " ".join(done.stderr.split())

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--rank", "0"),
            ("--rank", "x"),
            ("--svd", "fast"),
            ("--dtype", "fp8"),
            ("--memory", "lots"),
            ("--nope",),
            ("--factor", "-1"),
        ],
    )
    def test_wrong_usage_exits_2(self, pair: Path, arguments: tuple[str, ...]) -> None:
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", *arguments),
            "Usage",
            code=2,
        )

    def test_unknown_names_suggest_near_ones(self, pair: Path) -> None:
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--algo", "lokrr"),
            "unknown algorithm",
            "lokr",
        )
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--to", "khoya"),
            "unknown format",
            "kohya",
        )

    def test_a_small_memory_bound_is_refused_with_the_figure(self, pair: Path) -> None:
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "tuned.ckpt", "--memory", "1KB"),
            "working memory",
            "--memory",
        )


class TestMerge:
    def test_strengths_after_the_last_colon(self, pair: Path) -> None:
        done = adaptkit(
            "merge", "base.safetensors", "lora-kohya.safetensors:-0.5", "--json", cwd=pair
        )
        report = json.loads(done.stdout)
        assert report["adapters"][0]["strength"] == -0.5
        assert report["output"] == "base-merged.safetensors"
        assert report["tensors_changed"] == 104

    def test_dry_run_and_summary(self, pair: Path) -> None:
        done = adaptkit(
            "merge", pair / "base.safetensors", pair / "lora-kohya.safetensors", "--dry-run", "-v"
        )
        assert "would write" in done.stdout
        assert done.returncode == 0
        done = adaptkit(
            "merge",
            pair / "base.safetensors",
            pair / "lora-kohya.safetensors",
            "-o",
            pair / "m.safetensors",
            "-v",
        )
        assert "104 of" in done.stderr

    def test_an_adapter_for_another_family(self, pair: Path) -> None:
        stem = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
        save_file(
            {
                f"{stem}.lora_up.weight": torch.ones(8, 2),
                f"{stem}.lora_down.weight": torch.ones(2, 8),
            },
            pair / "xl.safetensors",
        )
        refused(
            adaptkit("merge", pair / "base.safetensors", pair / "xl.safetensors"),
            "Stable Diffusion XL",
            "xl.safetensors",
        )
        assert not list(pair.glob("*merged*"))

    def test_no_adapter_is_wrong_usage(self, pair: Path) -> None:
        refused(adaptkit("merge", pair / "base.safetensors"), "Missing argument", code=2)


class Reduce:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


T = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD = {
    "truncated": (lambda good: good[: len(good) // 2], "truncated"),
    "header of 2^63": (lambda _: header("{}", length=2**63), "header"),
    "overlap": (lambda _: header('{"a":%s,"b":%s}' % (T, T), b"\0" * 8), "overlap"),
    "duplicate": (lambda _: header('{"a":%s,"a":%s}' % (T, T), b"\0" * 4), "twice"),
    "unknown dtype": (lambda _: header('{"a":%s}' % T.replace("F32", "F31"), b"\0" * 4), "F31"),
    "empty": (lambda _: b"", "empty"),
    "text": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
    "html": (lambda _: b"<!DOCTYPE html><html></html>", "web page"),
    "pickle with code": (lambda _: pickle.dumps({"state_dict": Reduce()}), "system"),
}


class TestBadInput:
    """Each one clear error that names the file, exit 1, nothing written, the input unharmed."""

    @pytest.mark.parametrize("name", BAD)
    @pytest.mark.parametrize("command", ["extract", "merge base", "merge adapter"])
    def test_every_command_refuses(self, pair: Path, name: str, command: str) -> None:
        make, word = BAD[name]
        bad = pair / "bad.safetensors"
        bad.write_bytes(make((pair / "base.safetensors").read_bytes()))
        before, content = sorted(pair.iterdir()), bad.read_bytes()
        done = {
            "extract": lambda: adaptkit("extract", pair / "base.ckpt", bad, cwd=pair),
            "merge base": lambda: adaptkit("merge", bad, pair / "lora-kohya.safetensors", cwd=pair),
            "merge adapter": lambda: adaptkit("merge", pair / "base.ckpt", bad, cwd=pair),
        }[command]()
        refused(done, "bad.safetensors", word)
        assert sorted(pair.iterdir()) == before
        assert bad.read_bytes() == content

    def test_inspect_reports_the_good_files_and_exits_1(self, pair: Path) -> None:
        for name, (make, _) in BAD.items():
            (pair / f"bad {name}.safetensors").write_bytes(
                make((pair / "base.safetensors").read_bytes())
            )
        done = adaptkit("inspect", pair, "--json")
        files = json.loads(done.stdout)["files"]
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert sum("error" in record for record in files) == len(BAD)
        assert {record["kind"] for record in files if "error" not in record} == {
            "adapter",
            "checkpoint",
        }
        assert not (pair / "pwned").exists()

    def test_missing_files_and_folders(self, pair: Path) -> None:
        refused(adaptkit("extract", pair / "base.ckpt", pair / "tunde.ckpt"), "tunde.ckpt")
        (pair / "empty").mkdir()
        refused(adaptkit("merge", pair / "base.ckpt", pair / "empty"), "empty")
        refused(
            adaptkit(
                "extract",
                pair / "base.ckpt",
                pair / "tuned.ckpt",
                "-o",
                pair / "no" / "o.safetensors",
            ),
            "no such folder",
        )

    def test_families_that_differ(self, pair: Path) -> None:
        sdxl = {
            "model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4),
            "conditioner.embedders.1.model.text_projection": torch.ones(2, 2),
        }
        save_file(sdxl, pair / "xl.safetensors")
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "xl.safetensors"),
            "Stable Diffusion 1.x",
            "Stable Diffusion XL",
        )

    def test_nan(self, pair: Path) -> None:
        state = load_file(pair / "base.safetensors")
        key = "model.diffusion_model.middle_block.1.proj_in.weight"
        state[key].view(-1)[0] = float("nan")
        save_file(state, pair / "nan.safetensors")
        refused(
            adaptkit("extract", pair / "base.ckpt", pair / "nan.safetensors"),
            "nan.safetensors",
            key,
            "NaN",
        )

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
    def test_no_permission(self, pair: Path) -> None:
        pair.chmod(0o500)
        refused(
            adaptkit("merge", pair / "base.ckpt", pair / "lora-kohya.safetensors"), "permission"
        )
        pair.chmod(0o700)

    @pytest.mark.skipif(os.name == "nt", reason="signals")
    def test_interrupt_exits_130_and_leaves_nothing(self, pair: Path) -> None:
        code = (
            "import sys, time\nfrom adaptkit.ops.extract import fit as extract\n"
            "slow = extract.Fitter.load\n"
            "def load(self, job):\n    time.sleep(0.05)\n    return slow(self, job)\n"
            # as the console script does: a thread that still computes aborts a plain end of Python
            "extract.Fitter.load = load\nfrom adaptkit.cli import run\n"
            "sys.argv = ['adaptkit', 'extract', 'base.ckpt', 'tuned.ckpt']\nrun()\n"
        )
        before = sorted(pair.iterdir())
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=pair,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert "interrupted" in err
        assert out == ""
        assert sorted(pair.iterdir()) == before

    def test_a_defect_of_ours_is_one_line_unless_debugging(self, pair: Path) -> None:
        code = (
            "import sys\nfrom dataclasses import replace\nfrom adaptkit.ops import extract\n"
            "def broken(*_):\n    raise ZeroDivisionError('planted')\n"
            "extract.VERB = replace(extract.VERB, plan=broken)\nfrom adaptkit.cli import main\nsys.argv = ['adaptkit', 'extract', 'a', 'b']\nmain()\n"
        )
        run = lambda **env: subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | env,
        )
        refused(run(), "planted", "ADAPTKIT_DEBUG=1")
        assert "Traceback" in run(ADAPTKIT_DEBUG="1").stderr


class TestInspect:
    def test_the_record_has_the_contracts_fields(self, pair: Path) -> None:
        (record,) = json.loads(
            adaptkit("inspect", pair / "lora-kohya.safetensors", "--json", "--hash").stdout
        )["files"]
        fields = (
            "path bytes kind family format evidence algorithms components modules parameters dtypes ranks scales alpha_source "
            "unclaimed problems loads_in metadata sha256 autov2 autov3 sshs_model_hash"
        )
        assert set(fields.split()) <= record.keys()
        raw = (pair / "lora-kohya.safetensors").read_bytes()
        tensors = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
        assert record["autov2"] == hashlib.sha256(raw).hexdigest()[:10].upper()
        assert (record["autov3"], record["sshs_model_hash"]) == (tensors[:12].upper(), tensors)
        assert (record["kind"], record["family"], record["format"]) == ("adapter", "sd1", "kohya")
        assert record["algorithms"] == {"lora": 104}
        assert record["ranks"] == {"2": 104}
        assert record["scales"] == {"0.5": 104}
        assert record["alpha_source"] == "tensor"
        assert record["evidence"]["claimed"] == record["evidence"]["total"] == 312
        assert record["unclaimed"] == record["problems"] == []

    def test_keys_and_modules(self, pair: Path) -> None:
        shown = adaptkit("inspect", pair / "lora-kohya.safetensors", "--keys", "--modules")
        assert "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight" in shown.stdout
        assert "unet.mid_block.attentions.0.proj_in" in shown.stdout
        (record,) = json.loads(
            adaptkit("inspect", pair / "base.ckpt", "--keys", "--modules", "--json").stdout
        )["files"]
        assert record["kind"] == "checkpoint"
        assert len(record["keys"]) == 882
        assert record["components"] == {"unet": 686, "text_encoder": 196}

    def test_a_foreign_file_is_an_error(self, pair: Path) -> None:
        save_file({"emb_params": torch.ones(4, 4)}, pair / "embedding.safetensors")
        done = adaptkit("inspect", pair / "embedding.safetensors")
        assert done.returncode == 1
        assert "neither an adapter nor a checkpoint" in done.stderr


@pytest.mark.parametrize("name", ["formats", "families", "algorithms"])
def test_tables(name: str) -> None:
    assert adaptkit(name).returncode == 0
    assert len(json.loads(adaptkit(name, "--json").stdout)[name]) >= 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("combine", combine.Options),
        ("convert", convert.Options),
        ("resize", resize.Options),
        ("extract", extract.Options),
        ("merge", merge.Options),
        ("inspect", inspect.Options),
    ],
)
def test_options_are_the_fields_of_the_library(name: str, options: type) -> None:
    """Field name = keyword = command-line option; what the terminal half adds is only how to talk."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    terminal = {
        "as_json",
        "quiet",
        "verbose",
        "dry_run",
        "tuned",
        "adapter",
        "adapters",
        "files",
        "keys",
        "modules",
        "no_limits",
        "log_file",
        "suffix",
    }
    if name in ("extract", "merge"):
        terminal.add("base")  # an argument there
    if name == "inspect":
        terminal |= {"plot", "overwrite", "card", "html", "sort", "where", "as_csv"}
        terminal.add("overview")  # what a table needs, which the command decides
    parameters = {parameter.name for parameter in command.params} - terminal
    assert parameters == {field.name for field in dataclasses.fields(options)} - terminal
    for parameter in command.params:
        field = next((f for f in dataclasses.fields(options) if f.name == parameter.name), None)
        if field is not None and not parameter.multiple and field.default != ():
            context = click.Context(command)
            default = parameter.get_default(context)
            assert default == field.default or (not parameter.required and field.default is None), (
                parameter.name
            )


def test_every_option_has_a_help_text() -> None:
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)


def test_version_and_help() -> None:
    assert adaptkit("--version").stdout.startswith("adaptkit 0.")
    shown = adaptkit("-h").stdout
    assert all(word in shown for word in ("inspect", "extract", "merge"))
    refused(adaptkit("extrat"), "did you mean extract?", code=2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500KB", 500_000),
        ("64MB", 64_000_000),
        ("1.5GB", 1_500_000_000),
        ("64MiB", 2**26),
        ("10", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    from adaptkit.cli.options import SIZE

    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(
    ("argument", "path", "strength"),
    [
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:2", r"C:\x.safetensors", 2.0),
        ("plain", "plain", 1.0),
        ("a:b", "a:b", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:", "a:", 1.0),
    ],
)
def test_strengths(argument: str, path: str, strength: float) -> None:
    from adaptkit.ops.shared import split_strength

    assert split_strength(argument) == (Path(path), strength)
