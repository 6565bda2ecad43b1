"""Pages in Chromium, at the widths of a desk and of a phone, light and dark.

Needs the package `playwright` and an installed Chromium; without them these tests skip themselves.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptkit.cli import cli
from tests.cli.web import CJK, folder, made
from tests.synth import FIXTURES

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs an installed Chromium")

VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]

# every text that is shown: the least contrast to what is behind it (WCAG 2.2) and its size in pixels, computed by the browser
MEASURE = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "rgb(0,0,0)" : "rgb(255,255,255)";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    if (!node.checkVisibility() || node.closest("title")) continue;
    const style = getComputedStyle(node);
    const [low, high] = [light(node.namespaceURI.endsWith("svg") ? style.fill : style.color), light(behind(node))]
      .sort((a, b) => a - b);
    const box = node.getBoundingClientRect();
    const scale = node.ownerSVGElement ? node.ownerSVGElement.getScreenCTM().a : 1;
    found.push([(high + 0.05) / (low + 0.05), parseFloat(style.fontSize) * scale, node.textContent.slice(0, 60)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(folder(tmp_path_factory.mktemp("web")), None, "--modules")


class Shown:
    """A page that is open, and all that it said or asked for."""

    def __init__(self, browser, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda one: self.said.append(one.text))
        self.page.on("pageerror", lambda one: self.said.append(str(one)))
        self.page.on("request", lambda one: self.asked.append(one.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def names(self) -> list[str]:
        return self.page.locator("#files tbody tr:visible td:first-child").all_inner_texts()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_it_can_be_read_and_is_quiet(browser, page: Path, width: int, scheme: str) -> None:
    with Shown(browser, page, width, scheme) as shown:
        shown.page.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true })"
        )
        measured = shown.page.evaluate(MEASURE)
        assert len(measured) > 1000
        assert min(measured)[0] >= 4.5, min(measured)
        assert min(size for _, size, _ in measured) >= 11
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.page.evaluate("window.hacked === undefined")
        background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(254, 254, 254)", "dark": "rgb(22, 24, 29)"}[scheme]
        assert shown.said == []
        assert [one for one in shown.asked if not one.startswith("data:image/png")] == [
            page.as_uri()
        ]


def test_the_table_is_sorted_by_its_heads(browser, page: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in page.parent.glob("*.safetensors")}
    with Shown(browser, page) as shown:
        button = shown.page.get_by_role("button", name="size")
        button.click()
        names = shown.names()
        assert names[0] == "broken.safetensors"  # whose size is not known
        known = [sizes[name] for name in names[1:]]
        assert known == sorted(known)
        assert len(known) == 5
        button.click()
        assert shown.names() == names[::-1]
        assert shown.page.locator("th[aria-sort=descending]").inner_text().startswith("size")
        shown.page.get_by_role("button", name="file").click()
        assert shown.names() == sorted(names)


def test_it_is_searched_by_name_and_metadata(browser, page: Path) -> None:
    with Shown(browser, page) as shown:
        for words, wanted in (
            ("COMFY lora", ["lora-comfy.safetensors"]),
            ("tag 57", ["evil.safetensors"]),
            (CJK[:2], None),
            ("nothing has this", []),
        ):
            shown.page.locator("input").fill(words)
            names = shown.names()
            assert names == wanted if wanted is not None else CJK in names[0] or "evil" in names[0]
            told = f"{len(names)} of 6"
            assert shown.page.locator("#told").inner_text() == told
            assert shown.page.locator("details.file:visible").count() == len(names)
        shown.page.locator("input").fill("")
        assert len(shown.names()) == 6


@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_are_shown_whole_on_demand(browser, page: Path, width: int) -> None:
    with Shown(browser, page, width) as shown:
        name = shown.page.locator("#files a.long").filter(has_text=CJK)
        cut = "(one) => one.scrollWidth > one.clientWidth"
        assert name.evaluate(cut)
        name.focus()
        assert not name.evaluate(cut)
        name.click()  # opens the file's own part, whose title is whole
        opened = shown.page.locator("details.file[open]")
        assert opened.count() == 1
        assert opened.locator("h2").inner_text() == name.get_attribute("title")
        assert not opened.locator("h2").evaluate(cut)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_can_be_read(browser, tmp_path: Path, width: int, scheme: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plot.html"
    file = FIXTURES / "tiny" / "lora-kohya.safetensors"
    done = CliRunner().invoke(cli, ["inspect", str(file), "--plot", str(out), "-q"])
    assert done.exit_code == 0, done.output
    with Shown(browser, out, width, scheme) as shown:
        assert min(size for _, size, _ in shown.page.evaluate(MEASURE)) >= 10.5
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.said == []
        assert shown.asked == [out.as_uri()]
