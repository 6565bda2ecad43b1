"""A folder of adapters with all that a page must bear, and the page of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from adaptkit.cli import cli
from tests.synth import FIXTURES

# a title of the window, a forged line, bidi and zero-width characters, markup
EVIL = (
    "\x1b]0;owned\x07\x9b31m\r\nerror: forged\u202egnp.\u200b\u2028\ufeff[red]</script>"
    "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=2>"
)
CJK = "数字绘画スタイル그림"
LONG = "a very long name of a style that somebody trained for 40 epochs at rank 32 final final"
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def folder(into: Path) -> list[Path]:
    """Six files: two of them as trained, one hostile, one broken, one whose names need other fonts."""
    tiny = FIXTURES / "tiny"
    for name in ("lora-comfy", "lokr-kohya", "base"):
        (into / f"{name}.safetensors").write_bytes((tiny / f"{name}.safetensors").read_bytes())
    (into / f"{CJK} {LONG}.safetensors").write_bytes((tiny / "lora-kohya.safetensors").read_bytes())
    (into / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    tensors = {}
    for stem in (STEM, f"lora_unet_{EVIL}"):
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 8)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(8, 2)
    metadata = {
        EVIL: EVIL,
        "modelspec.title": CJK,
        "modelspec.thumbnail": PNG,
        "other.thumbnail": "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=",
        "ss_tag_frequency": json.dumps({"10_style": {f"tag {n} <b>": n for n in range(90)}}),
    }
    save_file(tensors, into / "evil.safetensors", metadata)
    return sorted(into.glob("*.safetensors"))


def made(files: list[Path], page: Path | None = None, *more: str) -> Path:
    page = page or files[0].parent / "page.html"
    done = CliRunner().invoke(cli, ["inspect", *map(str, files), "--html", str(page), *more])
    assert page.exists(), done.output
    return page
