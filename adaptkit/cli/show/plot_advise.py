"""Picture of `advise --plot`: error against file size, one line per rank rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.picture import INK, LINE, MUTED, SMALL, TINY, publish, rendered, settings
from adaptkit.cli.show.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from adaptkit.ops.advise import Report
    from adaptkit.ops.difference.advice import Point

__all__ = ["draw"]

# in inches
WIDTH, HEIGHT = 7.6, 4.8
PALE, AUTO, LOKR = "#9dbfe0", "#2f9e64", "#d9772b"
# smallest error that is drawn as such
LEAST = 1e-5


def draw(report: Report, title: str, path: Path, overwrite: bool) -> None:
    """Write the picture completely or not at all."""
    with settings():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.09, 0.12, 0.87, 0.72))
        figure.text(0.02, 0.94, safe(title).replace("$", r"\$"), fontsize=12, fontweight="bold")
        figure.text(0.02, 0.895, _subtitle(report), color=MUTED, fontsize=8.5)
        _fill(axes, report)
        data = rendered(figure, path.suffix.lower(), title, {})
    publish(path, data, overwrite)


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
    for rank, choice in report.rank.items():
        _say(axes, f"r{rank}", choice, (0, 5), MUTED)
    for factor, choice in report.lokr.items():
        _say(axes, f"f{factor}", choice, (0, -9), LOKR)
    if report.noise_floor > LEAST:
        axes.axhline(report.noise_floor, color=MUTED, lw=0.8, ls=":")
        axes.text(
            1,
            report.noise_floor,
            "rounding of the checkpoint ",
            color=MUTED,
            fontsize=TINY,
            ha="right",
            va="bottom",
            transform=axes.get_yaxis_transform(),
        )
    _scales(axes)
    axes.legend(frameon=False, fontsize=SMALL, loc="best")


def _place(choice: Point) -> tuple[float, float]:
    return choice.bytes, max(choice.relative_error, LEAST)


def _say(axes: Axes, text: str, choice: Point, beside: tuple[float, float], color: str) -> None:
    axes.annotate(
        text,
        _place(choice),
        beside,
        textcoords="offset points",
        fontsize=TINY,
        color=color,
        ha="center",
    )


def _scales(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("file size", color=INK)
    axes.set_ylabel("relative error  ‖ΔW − stored‖ / ‖ΔW‖", color=INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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
