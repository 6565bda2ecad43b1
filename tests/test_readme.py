"""The front page: its examples run and print what it shows, and its setup is what the checks run.

`python -m tests.test_readme [FILE...]` writes today's output into the examples of the README and
the guide.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.examples import README, blocks, check, documents, named, refresh
from tests.synth import ROOT

LENGTH = 250  # lines: what a person scrolls through
WIDTH = 100
PROSE = [
    *documents(),
    ROOT / "fixtures" / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / ".github" / "SECURITY.md",
]


def test_the_examples_print_what_is_shown() -> None:
    assert sum(len(list(block.commands)) for block in blocks(README)) >= 5
    check(README)


def test_it_stays_a_front_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LENGTH


def test_the_setup_commands_are_those_that_ci_runs() -> None:
    setup = [
        line
        for block in blocks(README)
        if block.language == "sh"
        for line in block.body.splitlines()
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


@pytest.mark.parametrize("document", PROSE, ids=named)
def test_lines_of_prose_are_short(document: Path) -> None:
    """Lines of code are as long as their output, and a row of a table is one line."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("document", PROSE, ids=named)
def test_files_that_are_linked_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert "://" in target or (document.parent / target).exists(), target


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or documents():
        refresh(path)
