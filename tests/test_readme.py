"""The README tells the truth: its commands run, print what it shows, and every command and key is in it.

`python -m tests.test_readme` writes today's output into its ```console blocks.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptkit.cli import cli
from tests.synth import FIXTURES, ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
VARIES = (
    (re.compile(r"(seconds\s+)[\d.]+"), r"\1…"),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
)


def blocks(language: str) -> list[str]:
    return [
        body for kind, body in BLOCK.findall(README.read_text(encoding="utf-8")) if kind == language
    ]


def examples(block: str) -> Iterator[tuple[str, str]]:
    """(command, expected output) of each `$` line of a console block."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    assert program == "adaptkit", command
    done = subprocess.run(
        [sys.executable, "-m", "adaptkit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=folder,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
    )
    return plain(done.stdout)


def plain(text: str) -> str:
    for pattern, replacement in VARIES:
        text = pattern.sub(replacement, text)
    return text.strip("\n") + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "tiny", tmp_path / "fixtures" / "tiny")
    return tmp_path


def test_console_examples_print_what_is_shown(folder: Path) -> None:
    found = [example for block in blocks("console") for example in examples(block)]
    assert len(found) >= 5
    for command, expected in found:
        assert run(command, folder) == plain(expected), command


def test_the_recipe_shown_is_the_one_that_runs() -> None:
    assert blocks("toml")[0] == (FIXTURES / "tiny" / "recipe.toml").read_text(encoding="utf-8")


def test_python_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


def test_every_command_is_documented() -> None:
    text = README.read_text(encoding="utf-8")
    for name in cli.commands or (
        "inspect",
        "extract",
        "merge",
        "formats",
        "families",
        "algorithms",
    ):
        assert f"adaptkit {name}" in text


def test_the_setup_commands_are_those_that_ci_runs() -> None:
    setup = [
        line
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("pip install")
    ]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(setup) == 2
    for line in setup:
        for command in line.split(" && "):
            words = [
                word
                for word in shlex.split(command)
                if word != "-o" and not word.endswith("tuned-lokr.safetensors")
            ]
            assert all(word in script for word in words), command


def refresh(folder: Path) -> None:
    """Write what the commands print today into the README."""
    text = README.read_text(encoding="utf-8")
    for block in blocks("console"):
        fresh = "".join(f"$ {command}\n{run(command, folder)}" for command, _ in examples(block))
        text = text.replace(f"```console\n{block}```", f"```console\n{fresh}```")
    README.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(FIXTURES / "tiny", Path(scratch) / "fixtures" / "tiny")
        refresh(Path(scratch))
