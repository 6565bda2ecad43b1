"""`inspect --stats` in a terminal and out of one, and the pictures of `inspect --plot`."""

from __future__ import annotations

import json
import os
import re
import select
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.cells import cell_len
from rich.color import Color
from rich.style import Style
from safetensors.torch import load_file, save_file

from adaptkit.cli.show import heat_map as _heat
from adaptkit.cli.show import picture as _picture
from adaptkit.cli.show import plot_inspect as _plot
from adaptkit.errors import AdaptkitError, CannotWrite, NothingToDo, WouldOverwrite
from adaptkit.ops import inspect
from tests.cli.test_cli import adaptkit, refused
from tests.synth import FIXTURES

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="session")
def report() -> inspect.Report:
    return inspect.run(FIXTURES / "tiny" / "lora-kohya.safetensors", inspect.Options(stats=True))


def lines(report: inspect.Report, width: int, coloured: bool) -> list[str]:
    return [line.plain for line in _heat.heat_map(report.record, report.modules, width, coloured)]


class TestHeatMap:
    def test_one_line_per_block_with_its_numbers(self, report: inspect.Report) -> None:
        shown = lines(report, 80, coloured=False)
        assert shown[0].split() == ["block", "‖ΔW‖", "r90", "r99", "q", "v", "proj"]
        blocks = {block["block"]: block for block in report.record["blocks"]}
        at = shown.index("unet.down_blocks")
        for n, line in enumerate(shown[at + 1 : at + 4]):
            block = blocks[f"unet.down_blocks.{n}"]
            number, norm, low, high = line.split()[:4]
            assert (number, float(norm)) == (str(n), pytest.approx(block["norm"], rel=5e-3))
            assert (int(low), int(high)) == (block["rank_90"], block["rank_99"])
        middle = next(line for line in shown if line.startswith("unet.mid_block"))
        assert len(re.findall(r"\d+ *", middle[36:])) == 3
        assert len(shown) == 1 + (1 + 3) + 1 + (1 + 3) + (1 + 12) + 1 + 1 + 3

    def test_cells_are_in_per_cent_of_the_strongest(self, report: inspect.Report) -> None:
        shown = lines(report, 80, coloured=True)
        values = [v for block in report.record["blocks"] for v in block["kinds"].values()]
        cells = [int(n) for line in shown[1:-5] for n in re.findall(r"\d+|<1", line[36:])]
        assert sorted(cells) == sorted(round(100 * value / max(values)) for value in values)
        assert f"{max(values):.3g}" in shown[-3]

    @pytest.mark.parametrize("coloured", [True, False])
    @pytest.mark.parametrize("width", [80, 120])
    def test_it_fits(self, report: inspect.Report, width: int, coloured: bool) -> None:
        many = dict.fromkeys(_heat.KINDS, 1.0)
        crowded = [
            {**block, "kinds": many, "norm": 1.2345e-11} for block in report.record["blocks"]
        ]
        record = {**report.record, "blocks": crowded}
        shown = [
            line.plain.rstrip() for line in _heat.heat_map(record, report.modules, width, coloured)
        ]
        assert max(map(cell_len, shown)) <= width
        assert any("terminal too narrow" in line for line in shown) == (width == 80)

    def test_every_cell_can_be_read_and_the_strong_ones_stand_out(self) -> None:
        faded = [Style.parse(_heat.colour(share / 100)) for share in range(10)]
        assert all(style.bgcolor is None for style in faded)
        contrasts = []
        for share in range(10, 101):
            style = Style.parse(_heat.colour(share / 100))
            assert style.color is not None
            assert style.bgcolor is not None
            contrasts.append(contrast(style.color, style.bgcolor))
        assert min(contrasts) >= 4.5
        assert [_heat.shade(share) for share in (0.0, 0.19, 0.21, 0.5, 0.7, 0.8, 1.0)] == [
            *"  ░▒▓██"
        ]

    def test_what_has_no_numbers_is_said(self, tiny: Path, tmp_path: Path) -> None:
        tensors = load_file(tiny / "lora-kohya.safetensors")
        ups = [key for key in tensors if "up_blocks_1" in key and "to_q.lora_up" in key]
        for key in ups:
            tensors[key.replace("lora_up.weight", "dora_scale")] = torch.ones(
                tensors[key].shape[0], 1
            )
        down = next(key for key in tensors if "down_blocks_0" in key and "lora_down" in key)
        tensors[down][:] = torch.nan
        save_file(tensors, tmp_path / "a.safetensors")
        shown = adaptkit("inspect", tmp_path / "a.safetensors", "--stats").stdout
        assert f"ΔW of {len(ups)} lora+dora modules depends on the weights" in shown
        (row,) = [
            line
            for line in shown.splitlines()
            if line.endswith("NaN/inf") and not line.startswith("all")
        ]
        assert row.split()[0] == "0"

    def test_out_of_a_terminal_it_is_plain(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        shown = adaptkit("inspect", tiny / "lora-kohya.safetensors", "--stats").stdout
        assert "\x1b" not in shown
        assert "█100" in shown
        assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" not in shown
        monkeypatch.delenv("COLUMNS")
        monkeypatch.setenv("TERM", "xterm-256color")
        again = adaptkit("inspect", tiny / "lora-kohya.safetensors", "--stats").stdout
        assert again == shown
        verbose = adaptkit(
            "inspect", tiny / "lora-kohya.safetensors", "--stats", "--modules"
        ).stdout
        assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in verbose

    @pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
    def test_in_a_terminal_it_has_colours_unless_they_are_not_wanted(self, tiny: Path) -> None:
        command = ["inspect", str(tiny / "lora-kohya.safetensors"), "--stats"]
        shown = in_terminal(command, TERM="xterm-256color", COLUMNS="80")
        assert "\x1b[1;38;5;231;48;5;" in shown
        assert "█" not in shown
        plain = in_terminal(command, TERM="xterm-256color", COLUMNS="80", NO_COLOR="1")
        assert not re.search(r"\x1b\[[\d;]*[34]8;", plain)
        assert "█100" in plain

    def test_json_lists_blocks_and_modules(self, tiny: Path) -> None:
        done = adaptkit("inspect", tiny / "lora-kohya.safetensors", "--stats", "--json")
        (record,) = json.loads(done.stdout)["files"]
        assert len(record["blocks"]) == 19
        fields = "block modules norm spectral_norm stable_rank rank_90 rank_99 non_finite_tensors zero_tensors kinds"
        assert list(record["blocks"][0]) == fields.split()
        fields = "block kind norm spectral_norm stable_rank rank_90 rank_99 non_finite_tensors zero_tensors"
        assert set(fields.split()) <= record["module_list"][0].keys()
        assert "plot" not in record

    def test_many_problems_are_counted(self, tiny: Path, tmp_path: Path) -> None:
        tensors = {
            key: torch.zeros_like(tensor) if "lora_up" in key else tensor
            for key, tensor in load_file(tiny / "lora-kohya.safetensors").items()
        }
        save_file(tensors, tmp_path / "a.safetensors")
        shown = adaptkit("inspect", tmp_path / "a.safetensors", "--stats").stdout
        assert shown.count("the module has no effect") == 1
        assert "warning: 104 modules: " in shown
        assert "and 101 more" in shown


def contrast(one: Color, other: Color) -> float:
    """Of WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(color: Color) -> float:
        parts = [value / 255 for value in color.get_truecolor()]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def in_terminal(command: list[str], **environment: str) -> str:
    """What a command prints when its output is a terminal."""
    ours, theirs = os.openpty()
    variables = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLORTERM", "FORCE_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "adaptkit", *command],
        stdout=theirs,
        stderr=theirs,
        env=variables | environment,
    )
    os.close(theirs)
    found, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux says so where others say that nothing is left
                break
            if not data:
                break
            found += data
    os.close(ours)
    assert process.wait(60) == 0
    return found.decode()


class TestPlot:
    def test_png(self, report: inspect.Report, tmp_path: Path) -> None:
        _plot.draw(report, tmp_path / "a.png", overwrite=False)
        data = (tmp_path / "a.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1000
        assert height > 500
        assert b"Software" not in data
        parts = b"".join(body for kind, body in chunks(data) if kind == b"IDAT")
        assert len(set(zlib.decompress(parts))) > 50  # it is not blank

    def test_svg_shows_every_block_and_kind(self, report: inspect.Report, tmp_path: Path) -> None:
        _plot.draw(report, tmp_path / "a.svg", overwrite=False)
        texts = [
            element.text for element in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")
        ]
        assert texts.count("lora-kohya.safetensors") == 1
        for name in (
            "unet.down_blocks",
            "unet.mid_block",
            "unet.up_blocks",
            "text_encoder.text_model.encoder.layers",
        ):
            assert name in texts
            assert any(text is not None and text.startswith(f"{name}  ·") for text in texts), (
                "its spectra"
            )
        assert {"q", "v", "proj", *map(str, range(12))} <= set(texts)
        for block in report.record["blocks"]:
            assert f"{block['norm']:.3g}" in texts
        assert "100" in texts

    def test_html_stands_alone(self, report: inspect.Report, tmp_path: Path) -> None:
        _plot.draw(report, tmp_path / "a.html", overwrite=False)
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert not re.search(r"http|<script|<link|<img|src=|@import|url\((?!#)|data:", page)
        assert "prefers-color-scheme: dark" in page
        assert not re.search(
            rf"({_picture.INK}|{_picture.MUTED}|{_picture.PAPER})", page.partition("</style>")[2]
        )
        cells = sum(len(block["kinds"]) for block in report.record["blocks"])
        assert page.count("<title>unet.") + page.count("<title>text_encoder.") == cells

    @pytest.mark.parametrize("suffix", ["html", "png"])  # a page holds the svg
    def test_the_same_file_gives_the_same_bytes(
        self, tiny: Path, tmp_path: Path, suffix: str
    ) -> None:
        """Whatever the hash seed, the user's style and backend."""
        (tmp_path / "matplotlibrc").write_text(
            "svg.fonttype: path\nlines.markeredgewidth: 4\ngrid.linestyle: :\n"
        )
        for name, environment in (
            ("a", {"PYTHONHASHSEED": "1"}),
            (
                "b",
                {
                    "PYTHONHASHSEED": "2",
                    "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
                    "MPLBACKEND": "TkAgg",
                },
            ),
        ):
            output = tmp_path / f"{name}.{suffix}"
            done = adaptkit(
                "inspect", tiny / "lokr-kohya.safetensors", "--plot", output, "-q", **environment
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()

    def test_it_implies_stats_and_says_what_it_wrote(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit(
            "inspect", tiny / "lora-kohya.safetensors", "--plot", tmp_path / "a.SVG", "--json"
        )
        assert len(json.loads(done.stdout)["files"][0]["blocks"]) == 19
        assert done.stderr == f"wrote {tmp_path / 'a.SVG'}\n"

    def test_names_are_text_and_nothing_else(self, report: inspect.Report, tmp_path: Path) -> None:
        name = "<script>alert(1)</script> $x$ \x07模型.safetensors"
        odd = inspect.Report(
            {**report.record, "path": name}, (), report.modules, None, report.spectra
        )
        for suffix in ("svg", "html", "png"):
            _plot.draw(odd, tmp_path / f"a.{suffix}", overwrite=False)
        texts = [
            element.text for element in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")
        ]
        assert (
            r"script> $x$ \x07模型.safetensors" in texts
        )  # the name of a path: what follows its last slash
        assert "<script" not in (tmp_path / "a.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "name", ["lokr-kohya", "full-kohya", "tucker-kohya", "lora-peft", "lokr-factored-kohya"]
    )
    def test_every_kind_can_be_drawn(self, tiny: Path, tmp_path: Path, name: str) -> None:
        found = inspect.run(tiny / f"{name}.safetensors", inspect.Options(stats=True))
        _plot.draw(found, tmp_path / "a.svg", overwrite=False)
        ElementTree.parse(tmp_path / "a.svg")

    def test_odd_contents_can_be_drawn(self, tmp_path: Path) -> None:
        """One layer of rank 1, a vector, a zero: nothing to divide by, nothing to take a logarithm of."""
        stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1"
        one = {"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(4, 4, 1, 1)}
        vector = {f"{stem}.w_norm": torch.ones(4)}
        zero = {f"{stem}.w_norm": torch.zeros(4)}
        for n, tensors in enumerate((one, vector, zero, one | vector)):
            save_file(tensors, tmp_path / f"{n}.safetensors")
            found = inspect.run(tmp_path / f"{n}.safetensors", inspect.Options(stats=True))
            _plot.draw(found, tmp_path / f"{n}.png", overwrite=False)


class TestRefusals:
    def test_suffix(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit("inspect", tiny / "lora-kohya.safetensors", "--plot", tmp_path / "a.pdf")
        refused(done, "--plot", ".png, .svg, .html", code=2)

    def test_several_files(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit("inspect", tiny, "--plot", tmp_path / "a.svg")
        refused(done, "one file", code=2)
        assert not list(tmp_path.iterdir())

    def test_an_existing_picture_stays(
        self, tiny: Path, tmp_path: Path, report: inspect.Report
    ) -> None:
        (tmp_path / "a.svg").write_text("mine")
        done = adaptkit("inspect", tiny / "lora-kohya.safetensors", "--plot", tmp_path / "a.svg")
        refused(done, "already exists", "--overwrite")
        with pytest.raises(WouldOverwrite):  # or comes up while the weights are read
            _plot.draw(report, tmp_path / "a.svg", overwrite=False)
        assert (tmp_path / "a.svg").read_text() == "mine"
        done = adaptkit(
            "inspect",
            tiny / "lora-kohya.safetensors",
            "--plot",
            tmp_path / "a.svg",
            "--overwrite",
            "-q",
        )
        assert done.returncode == 0
        assert (tmp_path / "a.svg").read_text().startswith("<?xml")

    def test_no_folder(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit(
            "inspect", tiny / "lora-kohya.safetensors", "--plot", tmp_path / "nowhere" / "a.svg"
        )
        refused(done, "no such folder")

    def test_without_the_library_nothing_is_read(self, tmp_path: Path) -> None:
        """The file does not even exist as an adapter: what is missing is said first."""
        (tmp_path / "fake" / "matplotlib").mkdir(parents=True)
        (tmp_path / "fake" / "matplotlib" / "__init__.py").write_text(
            "raise ModuleNotFoundError('No module named mpl')"
        )
        (tmp_path / "a.safetensors").write_bytes(b"no adapter")
        arguments = ("inspect", tmp_path / "a.safetensors", "--plot", tmp_path / "a.svg")
        done = adaptkit(*arguments, PYTHONPATH=f"{tmp_path / 'fake'}{os.pathsep}{Path.cwd()}")
        refused(done, "--plot needs matplotlib", 'pip install "adaptkit[plot]"')

    def test_a_library_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(AdaptkitError, match="needs matplotlib"):
            _picture.check(tmp_path / "a.svg", overwrite=False)

    def test_what_is_no_adapter(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit("inspect", tiny / "base.safetensors", "--plot", tmp_path / "a.svg", "-q")
        refused(done, "nothing to plot", "the file is a checkpoint")
        assert not list(tmp_path.iterdir())

    def test_what_has_no_numbers(self, report: inspect.Report, tmp_path: Path) -> None:
        none = inspect.Report({**report.record, "norm": None}, (), report.modules)
        with pytest.raises(NothingToDo, match="depends on the weights"):
            _plot.draw(none, tmp_path / "a.svg", overwrite=False)

    def test_a_failed_write_leaves_nothing(
        self, report: inspect.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        (tmp_path / "a.svg").write_text("mine")
        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(CannotWrite, match="No space left"):
            _plot.draw(report, tmp_path / "a.svg", overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
        assert (tmp_path / "a.svg").read_text() == "mine"


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found
