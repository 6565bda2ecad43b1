"""The pictures of `advise --plot` and `inspect --plot`: limits from the data, names that cover nothing, fonts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from adaptkit.cli.show import picture, plot_advise
from adaptkit.ops.difference.advice import Point

# those of a merged LoKr, of a fine-tune and of a merged LoRA: bytes and errors by rank, then by factor
REPORTS = {
    "lokr": (
        [
            (89e3, 0.85),
            (104e3, 0.74),
            (134e3, 0.56),
            (194e3, 0.34),
            (300e3, 0.12),
            *[(421e3, 0.042)] * 3,
        ],
        {
            2: (120e3, 0.65),
            4: (91e3, 0.68),
            8: (99.6e3, 0.042),
            16: (119.8e3, 0.7),
            32: (162e3, 0.68),
        },
    ),
    "finetune": (
        [
            (204e3, 0.96),
            (268e3, 0.92),
            (395e3, 0.85),
            (649e3, 0.72),
            (1.1e6, 0.5),
            *[(1.8e6, 0.11)] * 3,
        ],
        {
            2: (455e3, 0.85),
            4: (233e3, 0.947),
            8: (250e3, 0.941),
            16: (411e3, 0.87),
            32: (813e3, 0.67),
        },
    ),
    "one": ([(1e6, 0.5)], {2: (1e6, 0.5)}),
}


def report(name: str, floor: float = 0.001) -> SimpleNamespace:
    ranks, factors = REPORTS[name]

    def point(place: tuple[float, float]) -> Point:
        return SimpleNamespace(bytes=place[0], relative_error=place[1])  # type: ignore[return-value]

    return SimpleNamespace(
        rank={2**n: point(place) for n, place in enumerate(ranks)},
        size={2**n: point((a * 0.98, b * 0.8)) for n, (a, b) in enumerate(ranks)},
        auto={2**n: point((a * 0.9, b * 0.6)) for n, (a, b) in enumerate(ranks)},
        lokr={factor: point(place) for factor, place in factors.items()},
        made_by=None,
        family="sd1",
        layers=7,
        norm=1.0,
        noise_floor=floor,
    )


@pytest.mark.parametrize("name", REPORTS)
def test_names_cover_neither_one_another_nor_a_point(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with picture.settings():
        figure = plot_advise.drawn(report(name), "a − b")  # type: ignore[arg-type]
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes = figure.axes[0]
        boxes = {text: text.get_window_extent() for text in axes.texts}
        for one, other in itertools.combinations(boxes, 2):
            assert not boxes[one].overlaps(boxes[other]), (one.get_text(), other.get_text())
        around = axes.get_window_extent()
        for text, box in boxes.items():
            assert around.x0 <= box.x0 <= box.x1 <= around.x1, text.get_text()
            assert around.y0 <= box.y0 <= box.y1 <= around.y1, text.get_text()
            for line in axes.lines:
                for x, y in axes.transData.transform(line.get_xydata()):
                    assert not box.contains(x, y), text.get_text()
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= around.y1 - 1
        assert legend.x1 <= figure.bbox.x1
        assert all(not legend.overlaps(text.get_window_extent()) for text in figure.texts)


@pytest.mark.parametrize("name", ["lokr", "finetune"])
def test_limits_are_a_little_beyond_the_data(name: str) -> None:
    with picture.settings():
        axes = plot_advise.drawn(report(name), "a − b").axes[0]  # type: ignore[arg-type]
    shown = [point for line in axes.lines for point in line.get_xydata()]
    for values, (low, high) in zip(
        zip(*shown, strict=True), (axes.get_xlim(), axes.get_ylim()), strict=True
    ):
        assert low < min(values)
        assert max(values) < high
        room = math.log(high / low) - math.log(max(values) / min(values))
        assert room <= 0.17 * math.log(max(values) / min(values)) + 0.3


def test_points_in_one_place_have_one_name() -> None:
    with picture.settings():
        figure = plot_advise.drawn(report("lokr"), "a")  # type: ignore[arg-type]
    names = [text.get_text() for text in figure.axes[0].texts]
    assert "r32–128" in names
    assert sorted(names) == sorted(
        ["r1", "r2", "r4", "r8", "r16", "r32–128", "f2, f16", "f4", "f8", "f32"]
    )


def test_the_rounding_is_drawn_where_it_is_among_the_data() -> None:
    for floor, wanted in ((0.1, True), (0.0001, False)):
        with picture.settings():
            figure = plot_advise.drawn(report("lokr", floor), "a")  # type: ignore[arg-type]
        assert any("rounding" in text.get_text() for text in figure.axes[0].texts) is wanted


def test_names_in_other_scripts_are_no_boxes(tmp_path: Path) -> None:
    """Where a font for them is installed; the one of matplotlib draws them as empty boxes."""
    from matplotlib import rcParams

    with picture.settings("数字"):
        found = list(rcParams["font.family"])
    with picture.settings("ü ‖ΔW‖ Ж"):
        assert rcParams["font.family"] == ["DejaVu Sans"]
    if len(found) == 1:
        pytest.skip("no font for Chinese, Japanese or Korean is installed")
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with picture.settings("数字"):
        warnings.resetwarnings()
        warnings.simplefilter("error")
        figure = Figure()
        figure.text(0.1, 0.5, "数字绘画スタイル그림 style")
        FigureCanvasAgg(figure).draw()
