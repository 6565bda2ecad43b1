"""`inspect --html`: one page that asks for nothing, read with a parser here and in Chromium in `test_browser.py`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adaptkit.cli import cli
from adaptkit.cli.show.web import colours
from adaptkit.ops import inspect
from tests.cli.web import CJK, EVIL, PNG, folder, made

TAGS = {
    *(
        "html",
        "meta",
        "link",
        "title",
        "style",
        "script",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "input",
        "span",
    ),
    *(
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "button",
        "a",
        "details",
        "summary",
        "dl",
        "dt",
        "dd",
    ),
    *("figure", "figcaption", "svg", "path", "polygon", "polyline", "circle", "text", "img"),
}


class Parsed(HTMLParser):
    """The tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img"):
            self.stack.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.stack):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(folder(tmp_path_factory.mktemp("html"))).read_text(encoding="utf-8")


def test_it_stands_alone_and_may_load_and_run_nothing_else(page: str) -> None:
    found = Parsed(page)
    assert {tag for tag, _ in found.tags} <= TAGS
    for _, attributes in found.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "srcset")
        ]
        assert all(
            str(attributes[name]).startswith(("#f", "data:"))
            for name in ("src", "href")
            if name in attributes
        )
    (script,), (style,) = found.texts["script"], found.texts["style"]
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    for kind, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|@import|url\(", style + script)


def test_names_of_files_stay_text(page: str) -> None:
    assert all(one.isprintable() or one == "\n" for one in page)
    found = Parsed(page)
    assert page.count("<script") == 1
    assert not [a for t, a in found.tags if t == "img" and a["src"] != PNG]
    assert any("\\x1b]0;owned" in text and "</script>" in text for text in found.texts["td"])
    assert any(CJK in text for text in found.texts["h2"])


def test_it_holds_what_the_record_holds(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    file = tiny / "lora-kohya.safetensors"
    done = CliRunner().invoke(cli, ["inspect", str(file), "--html", str(out), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)["files"][0]
    found = Parsed(out.read_text(encoding="utf-8"))
    shades = [a for t, a in found.tags if t == "td" and "shade" in str(a.get("class"))]
    top = max(v for block in record["blocks"] for v in block["kinds"].values())
    wanted = [
        (f"shade s{round(20 * value / top)}", f"{block['block']}, {kind}: {value:.3g}")
        for block in record["blocks"]
        for kind, value in sorted(block["kinds"].items(), key=lambda one: ORDER.index(one[0]))
    ]
    assert [(a["class"], a["title"]) for a in shades] == wanted
    lists = len({re.sub(r"\.\d+$", "", block["block"]) for block in record["blocks"]})
    assert sum(tag == "polyline" for tag, _ in found.tags) == lists
    values = [
        a.get("data-value") for t, a in found.tags if t == "td" and a.get("class") == "number"
    ]
    assert float(values[0]) == record["bytes"] == file.stat().st_size
    assert float(values[2]) == pytest.approx(record["norm"], rel=1e-12)
    facts = dict(zip(found.texts["dt"], found.texts["dd"], strict=True))
    assert facts["family"] == record["family"]
    assert facts["parameters"] == f"{record['parameters']:,}"
    assert "modules" not in found.texts["h3"]


ORDER = ("q", "k", "v", "qkv", "out", "fused", "ff", "proj", "conv", "emb", "mod", "norm", "other")


def test_modules_that_stand_out_are_in_it(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "lora-kohya.safetensors")
    key = next(key for key in tensors if key.endswith("attn1_to_q.lora_up.weight"))
    tensors[key] *= 50
    save_file(tensors, tmp_path / "a.safetensors")
    file = [tmp_path / "a.safetensors"]
    found = Parsed(made(file, tmp_path / "a.html").read_text(encoding="utf-8"))
    assert any(head.startswith("stand out") for head in found.texts["h3"])
    record = inspect.run(file[0], inspect.Options(stats=True)).record
    cells = found.texts["td"]
    for one in record["outliers"]:
        assert cells[cells.index(one["module"]) - 1] == f"{one['score']:+.1f}"


def test_modules_are_listed_where_they_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    file = str(tiny / "lokr-kohya.safetensors")
    arguments = ["inspect", file, "--html", str(out), "--modules"]
    done = CliRunner().invoke(cli, arguments)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"wrote {out}"
    found = Parsed(out.read_text(encoding="utf-8"))
    assert found.texts["h3"][-1] in ("modules", "metadata")
    assert sum(a.get("class") == "long" for _, a in found.tags) == 1 + 25


def test_spectra_are_drawn_where_they_are(tiny: Path, tmp_path: Path) -> None:
    """The ends of the median, read back from the drawing, are the medians of the spectra."""
    from adaptkit.cli.show.web.spectra import groups

    file = tiny / "lora-kohya.safetensors"
    report = inspect.run(file, inspect.Options(stats=True))
    text = made([file], tmp_path / "a.html").read_text(encoding="utf-8")
    drawn = re.findall(r'<polyline class="middle" points="([^"]*)"', text)
    for line, layers in zip(drawn, groups(report).values(), strict=True):
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        shares = sorted(layer[1] / layer[0] if len(layer) > 1 else 0.0 for layer in layers)
        middle = (shares[(len(shares) - 1) // 2] + shares[len(shares) // 2]) / 2
        least = float(re.findall(r'text-anchor="end">([\d.e-]+)<', text)[-1])
        assert points[0][1] == 8.0  # σ₁ itself, at the top
        assert least ** ((points[1][1] - 8) / 130) == pytest.approx(middle, rel=0.02)


@pytest.mark.parametrize("theme", [colours.LIGHT, colours.DARK])
def test_every_text_has_contrast(theme: colours.Theme) -> None:
    for step in range(colours.STEPS):
        assert colours.contrast(theme.shade(step), theme.on_shade(step)) >= 4.5
    for behind in (theme.paper, theme.raised):
        for ink in (theme.ink, theme.muted, theme.error, theme.warning, theme.accent):
            assert colours.contrast(ink, behind) >= 4.5
    assert len(set(theme.named().values())) == len(theme.named())


def test_contrast_is_that_of_the_standard() -> None:
    """Published examples of WCAG: black on white, #777 and #767676 on white."""
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert colours.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert colours.contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)


def test_a_broken_file_is_in_it_and_ends_with_1(tmp_path: Path) -> None:
    files = folder(tmp_path)
    arguments = ["inspect", *map(str, files), "--html", str(tmp_path / "a.html")]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.return_value == 1
    found = Parsed((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "cannot be read" in found.texts["td"]
    assert any("truncated" in text for text in found.texts["p"])


def test_it_refuses_before_it_reads(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no header")
    (tmp_path / "a.html").write_text("mine")
    for name, word in (("a.html", "already exists"), ("a.pdf", ".html file")):
        done = CliRunner().invoke(cli, ["inspect", str(bad), "--html", str(tmp_path / name)])
        assert word in str(done.exception) + done.stderr
        assert "header" not in done.stderr
    assert (tmp_path / "a.html").read_text() == "mine"
    done = CliRunner().invoke(
        cli, ["inspect", str(bad), "--html", str(tmp_path / "a.html"), "--overwrite"]
    )
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_a_name_of_a_file_is_escaped_too(tiny: Path, tmp_path: Path) -> None:
    name = EVIL.replace("/", "∕")[:80] + ".safetensors"
    (tmp_path / name).write_bytes((tiny / "lora-kohya.safetensors").read_bytes())
    page = made([tmp_path / name], tmp_path / "a.html").read_text(encoding="utf-8")
    assert all(one.isprintable() or one == "\n" for one in page)
    assert page.count("<script") == 1
