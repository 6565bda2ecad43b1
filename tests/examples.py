"""The examples of the README and the guide: found, run, compared, refreshed.

A document is run from top to bottom in a folder of its own: the README next to a copy of
`fixtures`, a page of the guide in a copy of `fixtures/tiny`.

- ```console: each `$ adaptkit …` line is run, in this process, and prints what follows it.
- ```python: the block is executed.
- ```toml: the block is a recipe. One that begins with `# NAME` is written to that file for the
  examples after it; any other is a file of `fixtures/tiny`.
- ```sh, ```text and ```py are not run: other programs are needed. tests/test_jobs.py and
  tests/test_node.py run what is marked there.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptkit.cli import main
from tests.synth import FIXTURES, ROOT

README = ROOT / "README.md"
GUIDE = ROOT / "adaptkit" / "guide"
LANGUAGES = ("console", "python", "toml", "sh", "text", "py")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
VARIES = (
    (re.compile(r"(seconds\s+)[\d.]+"), r"\1…"),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
    # a line of progress every ten seconds, on a slow machine
    (re.compile(r"^(?!note:)[\w ]+(, pass \d+)?: ([\d.]+ \w* ?of .*|begins)\n", re.MULTILINE), ""),
)


@dataclass(frozen=True)
class Block:
    language: str
    body: str

    @property
    def commands(self) -> Iterator[tuple[str, str]]:
        """(command, expected output) of each `$` line of a console block."""
        for part in re.split(r"^\$ ", self.body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def documents() -> list[Path]:
    return [README, *sorted(GUIDE.rglob("*.md"))]


def named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(document: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(document.read_text(encoding="utf-8"))]


@contextlib.contextmanager
def workplace(document: Path) -> Iterator[None]:
    """The folder in which the examples of a document run, as the current one."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "fixtures" / "tiny"
        shutil.copytree(FIXTURES / "tiny", tiny)
        with contextlib.chdir(scratch if document == README else tiny):
            yield


def check(document: Path) -> None:
    """Run the examples of a document, and compare what they print with what it shows."""
    with workplace(document):
        for block in blocks(document):
            assert block.language in LANGUAGES, block.language
            if block.language == "console":
                for command, expected in block.commands:
                    assert run(command) == plain(expected), command
            else:
                follow(block, document)


def refresh(document: Path) -> None:
    """Write what the commands print today into a document."""
    text = document.read_text(encoding="utf-8")
    with workplace(document):
        for block in blocks(document):
            if block.language == "console":
                fresh = "".join(f"$ {command}\n{run(command)}" for command, _ in block.commands)
                text = text.replace(f"```console\n{block.body}```", f"```console\n{fresh}```", 1)
            else:
                follow(block, document)
    document.write_text(text, encoding="utf-8", newline="\n")


def follow(block: Block, document: Path) -> None:
    """Do what a block that is no console says."""
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.body, named(document), "exec"), {})
    elif block.language == "toml":
        first, _, rest = block.body.partition("\n")
        if first.startswith("# "):
            Path(first.removeprefix("# ")).write_text(rest, encoding="utf-8")
        else:
            files = (FIXTURES / "tiny").glob("*.toml")
            assert block.body in [file.read_text(encoding="utf-8") for file in files]


def run(command: str) -> str:
    """What a command prints on both streams, in a pipe."""
    program, *arguments = shlex.split(command)
    assert program == "adaptkit", command
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    before = gc.get_threshold()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            main()
        except SystemExit:
            pass
        finally:
            gc.set_threshold(*before)
    return plain(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]


def plain(text: str) -> str:
    for pattern, replacement in VARIES:
        text = pattern.sub(replacement, text)
    text = text.strip("\n")
    return f"{text}\n" if text else ""
