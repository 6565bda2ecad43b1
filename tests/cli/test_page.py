"""A pipe gets the lines that rich would write, without rich."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from adaptkit.cli import cli
from adaptkit.cli.show.page import Plain, Words, facts, page, table

PRINTED = [
    ("would write", "a [bold]name[/] :smile: 100 %.safetensors"),
    (Words("style.safetensors", "bold"), Words("adapter, 7.6 MB")),
    (Words("  error:", "red"), Words("a.b: alpha [1] is missing")),
    (),
    ("",),
    (facts([("adapter", "sdxl, kohya → comfy keys"), ("weights", "exact"), ("seconds", "0.1")]),),
    (facts([("a", "one\ntwo\nthree"), ("much longer", "‖ΔW‖"), ("empty", "")]),),
    (facts([("日本語", "風格\n画風"), ("adapter", "x" * 300)]),),
    (facts([]),),
    (
        table(
            ("size", "kind", "file"),
            [("1.0 kB", "adapter", "a"), ("900.0 MB", "checkpoint", "長い名前")],
            ("size",),
        ),
    ),
    (table(("rank", "none", "last"), [(4, None, "b\nc"), (128, "", "d")], ("rank", "last")),),
    (table(("file", "σ₁"), [("模型", 0.5), ("x", 12.25)], ("σ₁",)),),
    (table(("alone",), [("é",), ("[red]not red[/]",)]),),
    (table((), []),),
]


@pytest.mark.parametrize("parts", PRINTED, ids=lambda parts: str(parts)[:40])
def test_a_plain_page_reads_as_rich_writes_it(
    parts: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    Console(file=out, highlight=False, markup=False, emoji=False, width=10_000).print(
        *parts, style="yellow"
    )
    Plain(stderr=False).print(*parts, style="yellow")
    said = capsys.readouterr().out
    assert said.split("\n") == [line.rstrip() for line in out.getvalue().split("\n")]


def test_stderr_is_its_own_stream(capsys: pytest.CaptureFixture[str]) -> None:
    Plain(stderr=True).print("note: one")
    assert capsys.readouterr() == ("", "note: one\n")


@pytest.mark.parametrize("width", [40, 80])
def test_wrapped_lines_hang_under_their_beginning(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    text = " ".join(f"word{n}" for n in range(40))
    page().print(Words("  warning:", "yellow"), Words(text))
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert len(lines) > 2
    assert all(len(line.rstrip()) <= width for line in lines)
    assert lines[0].startswith("  warning: word0")
    assert all(line.startswith("    word") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == f"warning: {text}"


def test_the_table_of_commands_is_whole_at_80_columns() -> None:
    found = CliRunner().invoke(cli, ["--help"], terminal_width=80)
    commands = found.output.partition("Commands:")[2].strip().splitlines()
    assert len(commands) == len(cli.list_commands(None))  # type: ignore[arg-type]
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_a_person_gets_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(page(), Plain)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(page(), Console)


@pytest.mark.parametrize(
    "command",
    [("families",), ("formats",), ("algorithms",), ("convert", "{}", "--to", "comfy", "-v")],
)
def test_a_pipe_does_not_pay_for_rich(command: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    adapter = shutil.copy(tiny / "lora-kohya.safetensors", tmp_path)
    words = [word.format(adapter) for word in command]
    program = (
        "import sys\nfrom adaptkit.cli import main\nsys.argv = sys.argv[1:]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'rich.console' not in sys.modules and 'rich.text' not in sys.modules"
    )
    run = [sys.executable, "-c", program, "adaptkit", *words]
    done = subprocess.run(
        run, check=False, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
