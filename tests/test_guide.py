"""The guide: complete, true, current, and readable on a narrow terminal.

`python -m tests.test_guide` writes the generated tables anew.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import click
import pytest
from rich.cells import cell_len
from rich.text import Text

from adaptkit.cli import cli
from adaptkit.cli import help as guide
from tests.cli.test_cli import adaptkit, refused
from tests.examples import BLOCK, GUIDE, Block, blocks, check, documents, named
from tests.guide_tables import SECTION, TABLES, generate, generated

COMMANDS = cli.list_commands(click.Context(cli))
PAGES = guide.pages(COMMANDS)
NARROW = 80
MENTION = re.compile(r"`adaptkit help ([a-z-]+)`")


@pytest.mark.parametrize("document", documents()[1:], ids=named)
def test_examples_print_what_is_shown(document: Path) -> None:
    check(document)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_with_an_example_or_a_table(name: str) -> None:
    assert PAGES[name].group == "commands"
    file = GUIDE / "commands" / f"{name}.md"
    examples = [command.split()[1] for block in blocks(file) for command, _ in block.commands]
    assert name in examples or name in generated(file)


def test_only_commands_have_pages_of_commands() -> None:
    assert [topic for topic, page in PAGES.items() if page.group == "commands"] == COMMANDS


def test_every_file_is_a_topic_of_its_own() -> None:
    files = sorted(path.stem for path in GUIDE.rglob("*.md"))
    assert sorted(PAGES) == files
    assert {path.parent.name for path in GUIDE.rglob("*.md")} == guide.GROUPS.keys()


def test_the_list_names_every_page_in_80_columns() -> None:
    shown = adaptkit("help").stdout
    for page in PAGES.values():
        assert re.search(rf"^  {page.topic} +{re.escape(page.summary)}$", shown, re.MULTILINE)
    assert [line for line in shown.splitlines() if cell_len(line) > NARROW] == []


@pytest.mark.parametrize("topic", PAGES)
def test_a_page_in_a_pipe_is_its_markdown(topic: str) -> None:
    done = adaptkit("help", topic)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == PAGES[topic].text
    assert done.stdout.startswith("# ")
    assert "<!--" not in done.stdout


@pytest.mark.parametrize("width", [40, NARROW])
@pytest.mark.parametrize("topic", PAGES)
def test_a_page_fits_the_terminal(topic: str, width: int) -> None:
    lines = Text.from_ansi(guide.rendered(PAGES[topic], width)).plain.splitlines()
    assert [line for line in lines if cell_len(line) > width] == []
    words = " ".join(lines).replace(" ", "")
    assert PAGES[topic].summary.replace(" ", "").replace("`", "") in words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("rows", "paged"), [("10", True), ("1000", False)])
@pytest.mark.parametrize("arguments", [[], ["resize"]])
def test_a_terminal_gets_pages(
    arguments: list[str], rows: str, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(click, "echo_via_pager", sent.append)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", rows)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    cli.main(["help", *arguments], standalone_mode=False)
    assert bool(sent) is paged
    assert bool(terminal.getvalue()) is not paged
    assert "resize" in (sent[0] if paged else terminal.getvalue()).lower()


def test_unknown_topics_are_refused_with_the_nearest() -> None:
    refused(adaptkit("help", "reszie"), "unknown topic 'reszie'", "did you mean resize")
    refused(adaptkit("help", "qqq"), "unknown topic 'qqq'", "known: ")


@pytest.mark.parametrize("document", documents(), ids=named)
def test_topics_that_are_mentioned_exist(document: Path) -> None:
    for topic in MENTION.findall(document.read_text(encoding="utf-8")):
        assert topic in PAGES, topic


@pytest.mark.parametrize("document", documents(), ids=named)
def test_help_texts_stand_in_the_program_alone(document: Path) -> None:
    for block in blocks(document):
        for command, _ in block.commands:
            assert "--help" not in command


@pytest.mark.parametrize("name", TABLES)
def test_generated_sections_are_current(name: str) -> None:
    (path,) = (path for path in GUIDE.rglob("*.md") if name in generated(path))
    assert generated(path)[name] == TABLES[name]()


def test_every_generated_section_has_a_generator() -> None:
    for path in GUIDE.rglob("*.md"):
        assert generated(path).keys() <= TABLES.keys()
        assert len(SECTION.findall(path.read_text(encoding="utf-8"))) == len(generated(path))


def test_the_five_scripts_of_a_service_have_at_most_ten_lines() -> None:
    """`test_examples_print_what_is_shown` runs them."""
    page = (GUIDE / "reference" / "python.md").read_text(encoding="utf-8")
    section = page.partition("## Five scripts")[2].partition("\n## ")[0]
    scripts = [block.body for block in (Block(*found) for found in BLOCK.findall(section))]
    assert len(scripts) == 5
    assert [script for script in scripts if len(script.splitlines()) > 10] == []


if __name__ == "__main__":
    for path in GUIDE.rglob("*.md"):
        generate(path)
