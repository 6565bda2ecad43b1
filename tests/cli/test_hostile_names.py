"""Nothing that comes from a file reaches a terminal as more than visible text on its own line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from adaptkit.cli import cli
from adaptkit.cli.show.text import clean, json_safe, safe
from tests.synth import FIXTURES

# a title of the window, C1 controls, a forged line, bidi and zero-width characters
EVIL = "\x1b]0;owned\x07\x9b31m\r\nerror: forged\u202egnp.\u200b\u2028\ufeff[red]"
SEEN = "\\x1b]0;owned\\x07\\x9b31m\\x0d\\x0aerror: forged\\u202egnp.\\u200b\\u2028\\ufeff[red]"
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """An adapter with such names in keys, metadata and modules."""
    tensors = {}
    for stem in (STEM, STEM.replace("_q", "_k"), f"lora_unet_{EVIL}"):
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 8)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(8, 2)
    tensors[EVIL] = torch.ones(2)
    metadata = {"modelspec.title": EVIL, EVIL: EVIL}
    save_file(tensors, tmp_path / "evil.safetensors", metadata)
    return tmp_path / "evil.safetensors"


def visible(text: str) -> bool:
    return all(one.isprintable() or one == "\n" for one in text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{evil}", "--keys", "--modules"],
        ["inspect", "{evil}", "--family", "sd1\x1b[2J"],
        ["inspect", "{evil}", "{tiny}/lora-kohya.safetensors", "no\x1bsuch\r\nfile"],
        ["convert", "{evil}", "--to", "diffusers", "--allow-unused", "-o", "{out}", "-v"],
        ["convert", "{evil}", "--to", "diffusers", "--allow-unused", "--dry-run", "-v"],
        ["resize", "{evil}", "--rank", "1", "--allow-unused", "-o", "{out}", "-v"],
        ["compare", "{evil}", "{tiny}/lora-kohya.safetensors", "-v"],
        ["merge", "{tiny}/base.safetensors", "{evil}", "--dry-run", "--allow-unused", "-v"],
    ],
)
def test_no_control_character_and_no_forged_line(
    arguments: list[str], evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptkit.cli import main

    places = {"evil": evil, "tiny": FIXTURES / "tiny", "out": tmp_path / "out.safetensors"}
    colours = ("", "1") if arguments[0] == "inspect" else ("",)
    for coloured in colours:
        monkeypatch.setenv("FORCE_COLOR", coloured)
        monkeypatch.setattr("sys.argv", ["adaptkit", *(a.format(**places) for a in arguments)])
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        found = CliRunner().invoke(click.command()(main))
        # rich's own colours are the only sequences that may be there
        text = re.sub(r"\x1b\[[\d;]*m", "", found.stdout + found.stderr)
        assert visible(text), repr(text)
        assert not any(line.startswith("error: forged") for line in text.splitlines())
        assert "unexpected" not in text


def test_json_escapes_what_terminals_obey_and_stays_the_same_document(evil: Path) -> None:
    found = CliRunner().invoke(cli, ["inspect", str(evil), "--json", "--keys"])
    assert visible(found.stdout)
    assert json.loads(found.stdout)["files"][0]["metadata"][EVIL] == EVIL


def test_the_escapes() -> None:
    assert safe(EVIL) == SEEN
    assert safe("ü 数 ‖ΔW‖ \\n") == "ü 数 ‖ΔW‖ \\n"
    assert clean({EVIL: [EVIL, (1, EVIL)]}) == {SEEN: [SEEN, (1, SEEN)]}
    assert json_safe(json.dumps(EVIL, ensure_ascii=False)).isprintable()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_pages_and_pictures(evil: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bad = tmp_path / "<script>alert(1)<b>\x1b\u202e.safetensors"
    bad.write_bytes(evil.read_bytes())
    page = tmp_path / "page.html"
    found = CliRunner().invoke(cli, ["inspect", str(bad), "--plot", str(page), "-q"])
    assert found.exit_code == 0, found.output
    text = page.read_text(encoding="utf-8")
    assert visible(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
