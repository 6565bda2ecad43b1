"""Picture of `advise --plot`: error against file size, one line per rank rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.picture import INK, LINE, MUTED, SMALL, TINY, publish, rendered, settings
from adaptkit.cli.show.text import safe
from adaptkit.cli.show.web.colours import LIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from adaptkit.ops.advise import Report
    from adaptkit.ops.difference.advice import Point

__all__ = ["Labels", "draw", "drawn"]

# in inches
WIDTH, HEIGHT = 7.6, 4.8
PALE, AUTO, LOKR = "#8db3d9", "#2f9e64", "#d9772b"
# pixels: points so near have one name; a line is sampled so often
NEAR, STEP = 7.0, 4.0
# left, bottom, right, top in pixels
Box = tuple[float, float, float, float]
# smallest error that is drawn as such
LEAST = 1e-5


def draw(report: Report, title: str, path: Path, overwrite: bool) -> None:
    """Write the picture completely or not at all."""
    with settings(title):
        data = rendered(drawn(report, title), path.suffix.lower(), title, {})
    publish(path, data, overwrite)


def drawn(report: Report, title: str) -> Figure:
    """The figure; call within `settings`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.09, 0.12, 0.87, 0.71))
    figure.text(0.02, 0.945, safe(title), fontsize=12, fontweight="bold", parse_math=False)
    figure.text(0.02, 0.9, _subtitle(report), color=MUTED, fontsize=8.5)
    _fill(axes, report)
    return figure


def _subtitle(report: Report) -> str:
    made = report.made_by
    if made is None:
        kind = "no merged adapter detected"
    elif made["algorithm"] == "lora":
        kind = f"a merged LoRA of rank {made['rank']}"
    else:
        kind = f"a merged LoKr of factor {made['factor']}"
    return f"{report.family} · {report.layers} layers differ · ‖ΔW‖ = {report.norm:.3g} · {kind}"


def _fill(axes: Axes, report: Report) -> None:
    lines: tuple[tuple[str, Sequence[Point], dict[str, Any]], ...] = (
        (
            "LoRA, one rank (--rank)",
            list(report.rank.values()),
            {"color": PALE, "marker": "o", "lw": 1.6},
        ),
        (
            "LoRA, ranks chosen (--size)",
            list(report.size.values()),
            {"color": LINE, "marker": "o", "lw": 1.6},
        ),
        (
            "the best for each layer (auto)",
            list(report.auto.values()),
            {"color": AUTO, "marker": "s", "lw": 1.6},
        ),
        ("LoKr, by factor", list(report.lokr.values()), {"color": LOKR, "marker": "D", "lw": 0}),
    )
    for name, choices, style in lines:
        if choices:
            axes.plot(*zip(*map(_place, choices), strict=True), label=name, ms=3.6, **style)
    _scales(axes)
    _limits(axes, [_place(choice) for _, choices, _ in lines for choice in choices])
    if axes.get_ylim()[0] < report.noise_floor < axes.get_ylim()[1]:
        _floor(axes, report.noise_floor)
    axes.legend(
        frameon=False, fontsize=SMALL, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4
    )
    labels = Labels(axes)
    labels.add("r", {rank: _place(choice) for rank, choice in report.rank.items()}, MUTED)
    labels.add("f", {factor: _place(one) for factor, one in report.lokr.items()}, LIGHT.accent)


def _limits(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Limits a little beyond all points, on the logarithmic scales."""
    sizes, errors = zip(*points, strict=True)
    axes.set_xlim(_beyond(sizes))
    axes.set_ylim(_beyond(errors))


def _beyond(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.15)
    return low / room, high * room


def _floor(axes: Axes, error: float) -> None:
    axes.axhline(error, color=MUTED, lw=0.8, ls=":")
    axes.text(
        0,
        error,
        " rounding of the checkpoint",
        color=MUTED,
        fontsize=TINY,
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )


class Labels:
    """Names of points, each where it covers no point, no line and no other name.

    Points that lie on one another get one name together.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.pixel: float = axes.figure.dpi / 72
        self.taken = [box for line in axes.lines for box in self._along(line.get_xydata())]

    def add(self, letter: str, points: Mapping[int, tuple[float, float]], color: str) -> None:
        """Name points by their numbers, those in one place together."""
        held: list[tuple[tuple[float, float], list[int]]] = []
        for number, point in points.items():
            place = self._screen(point)
            near = (one for at, one in held if math.dist(self._screen(at), place) < NEAR)
            if (same := next(near, None)) is not None:
                same.append(number)
            else:
                held.append((point, [number]))
        for point, numbers in held:
            self._write(_numbered(letter, sorted(numbers), sorted(points)), point, color)

    def _write(self, text: str, point: tuple[float, float], color: str) -> None:
        x, y = self._screen(point)
        width, height = 0.72 * TINY * len(text) * self.pixel, 1.2 * TINY * self.pixel
        (left, low), (right, high) = self.axes.transAxes.transform(((0, 0), (1, 1)))

        def cost(beside: tuple[float, float]) -> float:
            a, b = x + beside[0] * self.pixel, y + beside[1] * self.pixel
            box = (a - width / 2, b - height / 2, a + width / 2, b + height / 2)
            outside = box[0] < left or box[1] < low or box[2] > right or box[3] > high
            return float(100 * outside + sum(_overlap(box, other) for other in self.taken))

        around = [
            (far * math.cos(turn) * (1 + len(text) / 4), far * math.sin(turn))
            for far in (7.5, 10, 14, 19, 25)
            for turn in (math.pi * n / 4 for n in (2, 6, 0, 4, 1, 3, 5, 7))
        ]
        across, up = min(around, key=cost)
        a, b = x + across * self.pixel, y + up * self.pixel
        self.taken.append((a - width / 2, b - height / 2, a + width / 2, b + height / 2))
        style: dict[str, Any] = {"fontsize": TINY, "color": color, "ha": "center", "va": "center"}
        self.axes.annotate(text, point, (across, up), textcoords="offset points", **style)

    def _screen(self, point: tuple[float, float]) -> tuple[float, float]:
        x, y = self.axes.transData.transform(point)
        return float(x), float(y)

    def _along(self, points: Any) -> Iterator[Box]:
        """Small boxes over a line and its points; `points` is (n, 2)."""
        places = [self._screen(point) for point in points]
        for one, other in zip(places, [*places[1:], places[-1]], strict=True):
            steps = max(1, round(math.dist(one, other) / STEP))
            for n in range(steps):
                x, y = (a + (b - a) * n / steps for a, b in zip(one, other, strict=True))
                size = 2.5 * self.pixel if n == 0 else 1.0
                yield x - size, y - size, x + size, y + size


def _numbered(letter: str, numbers: Sequence[int], among: Sequence[int]) -> str:
    """The name of some numbers: `r32–128` where all between them are named too."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and [n for n in among if first <= n <= last] == list(numbers):
        return f"{letter}{first}–{last}"
    return ", ".join(f"{letter}{n}" for n in numbers)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _place(choice: Point) -> tuple[float, float]:
    return choice.bytes, max(choice.relative_error, LEAST)


def _scales(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("file size", color=INK)
    axes.set_ylabel("relative error  ‖ΔW − stored‖ / ‖ΔW‖", color=INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    axes.yaxis.set_major_formatter(FuncFormatter(_share))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=MUTED, alpha=0.2, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _size(value: float, _: object) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} B"


def _share(value: float, _: object) -> str:
    return f"{value:.0%}" if value >= 0.01 else f"{value:g}"
