"""What a shell completes, and what is said when torch is missing or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from adaptkit.cli import cli
from tests.cli.test_cli import process

LORA = "lora-kohya.safetensors"


def offered(*words: str, shell: type[ShellComplete] = BashComplete) -> list[str]:
    """What is offered for the last word."""
    completer = shell(cli, {}, "adaptkit", "_ADAPTKIT_COMPLETE")
    return [item.value for item in completer.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize("shell", [BashComplete, ZshComplete, FishComplete])
def test_commands_options_and_names_are_completed(shell: type[ShellComplete]) -> None:
    assert offered("con", shell=shell) == ["convert"]
    assert offered("convert", "x", "--allow", shell=shell) == ["--allow-unused"]
    assert offered("convert", "x", "--to", "ko", shell=shell) == ["kohya", "kohya-oft"]
    assert offered("combine", "x", "--to", "pe", shell=shell) == ["peft"]
    assert offered("extract", "x", "y", "--to", "COM", shell=shell) == ["comfy"]
    assert offered("inspect", "x", "--format", "xl", shell=shell) == ["xlabs"]
    assert offered("convert", "x", "--for", "", shell=shell) == [
        "a1111",
        "comfyui",
        "diffusers",
        "forge",
        "invokeai",
        "kohya",
        "mflux",
        "sdcpp",
        "sdnext",
        "wan2gp",
    ]
    assert offered("merge", "b", "x", "--family", "sdx", shell=shell) == ["sdxl", "sdxl-refiner"]
    assert offered("advise", "b", "x", "--family", "z", shell=shell) == ["z-image"]
    assert offered("extract", "b", "x", "--algo", "", shell=shell)[-2:] == ["full", "auto"]
    assert offered("convert", "x", "--algo", "lo", shell=shell) == ["lora", "lokr"]
    assert offered("inspect", "x", "--sort", "ra", shell=shell) == ["rank"]
    assert offered("help", "every", shell=shell) == ["every-job"]


def test_files_are_left_to_the_shell() -> None:
    completer = BashComplete(cli, {}, "adaptkit", "_ADAPTKIT_COMPLETE")
    for words in (["inspect"], ["merge", "base.safetensors"], ["compare"], ["resize", "-o"]):
        assert {item.type for item in completer.get_completions(words, "st")} == {"file"}, words


@pytest.mark.skipif(os.name == "nt", reason="asks bash for its version")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_lines_of_the_guide_give_a_script(shell: str) -> None:
    page = process("help", "install").stdout
    assert f"_ADAPTKIT_COMPLETE={shell}_source adaptkit" in page
    done = process(_ADAPTKIT_COMPLETE=f"{shell}_source")
    assert "_ADAPTKIT_COMPLETE" in done.stdout
    assert "adaptkit" in done.stdout


STUBS = {
    "a library is missing": 'raise OSError("libcudart.so.12: cannot open shared object file")',
    "half installed": "from torch._C import nothing",
    "anything": 'raise RuntimeError("numpy was built for another ABI")',
}


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS)
def test_a_broken_torch_is_one_error_with_the_line_that_mends_it(
    tiny: Path, tmp_path: Path, stub: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(stub)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = ("resize", tiny / LORA, "--rank", "1", "-o", tmp_path / "x.safetensors")
    done = process(*command, PYTHONPATH=path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "PyTorch cannot be imported: " in errors[0]
    assert "hint: pip install --force-reinstall torch" in done.stderr
    assert "Traceback" not in done.stderr
    if "RuntimeError" not in stub:
        return
    document = json.loads(process(*command, "--json", PYTHONPATH=path).stdout)
    assert "PyTorch" in document["error"]["message"]
    # what needs no torch works
    assert process("inspect", tiny / LORA, PYTHONPATH=path).returncode == 0
    script = (
        "import sys, adaptkit as ak\n"
        "try:\n    ak.open(sys.argv[1]).resize(rank=1)\n"
        "except ak.AdaptkitError as error:\n    print(error.hint)\n"
    )
    environment = {**os.environ, "PYTHONPATH": path}
    said = subprocess.run(
        [sys.executable, "-c", script, tiny / LORA],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.stdout.startswith("pip install --force-reinstall torch"), said.stderr


def test_a_missing_torch_is_one_error_too(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = process("resize", tiny / LORA, "--rank", "1", "-o", tmp_path / "x", PYTHONPATH=path)
    assert done.returncode == 1
    assert "error: PyTorch is not installed" in done.stderr
    assert "hint: pip install torch" in done.stderr
