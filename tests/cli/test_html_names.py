"""Hostile text at every place of a file from which it reaches the page of `inspect --html`."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_html import Parsed
from tests.cli.web import STEM, made

TRICKS = {
    "control": "\x00\x07\x1b]0;owned\x07\x7f\x9b31m",
    "lines": "\r\nerror: forged\x85\u2028\u2029",
    "bidi": "\u202a\u202e\u2066\u2069\u200e\u061cgnp.",
    "zero-width": "a\u200b\u200c\u200d\u2060\ufeff\u00adb",
    "script": "</script><script>window.hacked=1</script></style><!--",
    "markup": "<img src=x onerror=window.hacked=2></td></table>",
    "quotes": "\"'` onmouseover=window.hacked=3 x=\"'",
    "entities": "&lt;b&gt;&#x202e;&#0;&amp;",
}
PLAIN = "harmless"


def tensors(layer: str) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_down.weight": torch.ones(2, 8),
        f"{layer}.lora_up.weight": torch.ones(8, 2),
    }


def with_key(folder: Path, text: str) -> Path:
    save_file(tensors(STEM) | tensors(f"lora_unet_mark{text}mark"), folder / "a.safetensors")
    return folder / "a.safetensors"


def with_metadata_key(folder: Path, text: str) -> Path:
    save_file(tensors(STEM), folder / "a.safetensors", {f"mark{text}mark": "1"})
    return folder / "a.safetensors"


def with_metadata(folder: Path, text: str) -> Path:
    save_file(tensors(STEM), folder / "a.safetensors", {"comment": f"mark{text}mark"})
    return folder / "a.safetensors"


def with_title(folder: Path, text: str) -> Path:
    save_file(tensors(STEM), folder / "a.safetensors", {"modelspec.title": f"mark{text}mark"})
    return folder / "a.safetensors"


def allowed(text: str) -> str:
    """Text that the name of a file can hold."""
    return text.replace("\0", "").replace("/", "∕")


def with_name(folder: Path, text: str) -> Path:
    path = folder / f"mark{allowed(text)}mark.safetensors"
    save_file(tensors(STEM), path)
    return path


def with_name_of_broken(folder: Path, text: str) -> Path:
    path = with_name(folder, text)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return path


PLACES = {
    made.__name__.removeprefix("with_"): made
    for made in (with_key, with_metadata_key, with_metadata, with_title, with_name, with_name_of_broken)
}  # fmt: skip


def parsed(make, folder: Path, text: str) -> Parsed:
    folder.mkdir()
    page = made([make(folder, text)], folder / "page.html", "--modules")
    return Parsed(page.read_text(encoding="utf-8"))


def escaped(place: str, text: str) -> str:
    """What the page shows: values of metadata keep their lines."""
    if place.startswith("name"):
        text = allowed(text)
    kept = "\n" if place in ("metadata", "title") else ""
    text = text.replace("\r\n", "\n") if kept else text
    return "".join(
        one
        if one.isprintable() or one == kept
        else f"\\x{ord(one):02x}"
        if ord(one) < 256
        else f"\\u{ord(one):04x}"
        for one in text
    )


@pytest.mark.parametrize("place", PLACES)
def test_text_of_a_file_stays_text(place: str, tmp_path: Path) -> None:
    """Read as a browser reads it, entities decoded: nothing hidden, and no tag more than a plain name makes."""
    if os.name == "nt" and "name" in place:
        pytest.skip("Windows has no such file names")
    plain = parsed(PLACES[place], tmp_path / "plain", PLAIN)
    for n, (trick, text) in enumerate(TRICKS.items()):
        found = parsed(PLACES[place], tmp_path / str(n), text)
        shown = [one for many in found.texts.values() for one in many]
        values = [v for _, given in found.tags for v in given.values() if v is not None]
        hidden = {c for one in shown + values for c in one
                  if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"}  # fmt: skip
        assert hidden == set(), (trick, hidden)
        kinds, usual = (
            {(tag, *sorted(given)) for tag, given in one.tags} for one in (found, plain)
        )
        assert kinds <= usual, trick
        assert any(f"mark{escaped(place, text)}mark" in one for one in shown), trick
