"""Picture of `inspect --plot`: norms, ranks and spectra of the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.heat_map import grouped, percent, short
from adaptkit.cli.show.picture import SMALL, TINY, publish, rendered, settings
from adaptkit.cli.show.text import safe
from adaptkit.cli.show.web.colours import LIGHT, LINE, MUTED, PAPER, STEPS
from adaptkit.cli.show.web.spectra import LONG, Spectra, counted
from adaptkit.cli.show.web.spectra import groups as spectra_of
from adaptkit.errors import NothingToDo
from adaptkit.ops.blocks import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from adaptkit.ops.inspect import Report

__all__ = ["draw"]

# inches: a row, a cell, the names, the bars, the ranks, a spectrum
ROW, CELL, NAMES, BARS, RANKS, SPECTRUM = 0.19, 0.42, 1.15, 1.45, 1.2, 3.2
# inches: the margins, the gap, the least and greatest height of a spectrum
TOP, BOTTOM, SIDE, GAP, LEAST, MOST = 1.05, 0.62, 0.25, 0.22, 1.25, 2.4


def draw(report: Report, path: Path, overwrite: bool) -> None:
    """Write the picture in the format of its suffix, completely or not at all."""
    if report.record.get("norm") is None:
        kinds = {
            "checkpoint": "the file is a checkpoint",
            "adapter": "the adapter is of an unknown kind",
        }
        depends = "the ΔW of its modules depends on the weights of the checkpoint"
        why = depends if "blocks" in report.record else kinds[report.record["kind"]]
        raise NothingToDo(f"nothing to plot: {why}", file=report.record["path"])
    with settings(PurePath(report.record["path"]).name):
        page = _Page.of(report)
        page.fill(report)
        data = rendered(page.figure, path.suffix.lower(), page.title, page.tips)
    publish(path, data, overwrite)


# the drawing


@dataclass(frozen=True)
class _Row:
    """One line of the left half: a block, or the heading of a list of blocks."""

    name: str
    block: Mapping[str, Any] | None
    bold: bool = False


def _rows(blocks: Sequence[Mapping[str, Any]]) -> Iterator[_Row]:
    for name, members in grouped(blocks).items():
        if len(members) == 1 and members[0]["block"] == name:
            yield _Row(name, members[0], bold=True)
            continue
        yield _Row(name, None, bold=True)
        for block in members:
            yield _Row(block["block"].removeprefix(name)[1:] or "rest", block)


@dataclass
class _Page:
    """The figure, measured in inches from its upper left corner."""

    title: str
    rows: tuple[_Row, ...]
    kinds: tuple[str, ...]
    # list of blocks → spectra of its modules
    groups: Mapping[str, Sequence[Sequence[float]]]
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report) -> _Page:
        from matplotlib.figure import Figure

        blocks = report.record["blocks"]
        rows = tuple(_rows(blocks))
        kinds = tuple(kind for kind in KINDS if any(kind in block["kinds"] for block in blocks))
        groups = spectra_of(report)
        width = (
            2 * SIDE
            + NAMES
            + len(kinds) * CELL
            + BARS
            + RANKS
            + 3 * GAP
            + bool(groups) * (SPECTRUM + 2 * GAP)
        )
        height = TOP + BOTTOM + max(len(rows) * ROW, len(groups) * LEAST)
        name = safe(PurePath(report.record["path"]).name)
        return cls(name, rows, kinds, groups, Figure(figsize=(width, height)))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes without a frame."""
        w, h = self.figure.get_size_inches()
        found = self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
        found.spines[:].set_visible(False)
        found.tick_params(length=0, labelsize=TINY, pad=2)
        return found

    def strip(self, left: float, width: float) -> Axes:
        """Add axes next to the rows, one unit per row, from the top down."""
        found = self.axes(left, TOP, width, len(self.rows) * ROW)
        found.set_ylim(len(self.rows) - 0.5, -0.5)
        found.set_yticks([])
        return found

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write text at a place; a $ starts no formula."""
        w, h = self.figure.get_size_inches()
        self.figure.text(
            left / w, 1 - top / h, safe(text), parse_math=False, va="baseline", **style
        )

    def fill(self, report: Report) -> None:
        """Draw everything."""
        self.write(SIDE, 0.34, self.title, fontsize=13, fontweight="bold")
        self.write(SIDE, 0.56, _subtitle(report), color=MUTED, fontsize=8.5)
        left = SIDE + NAMES
        _names(self)
        _cells(self, left)
        left += len(self.kinds) * CELL + GAP
        _bars(self, left)
        left += BARS + GAP
        _ranks(self, left)
        if self.groups:
            _spectra(self, left + RANKS + 2.5 * GAP, report)


def _subtitle(report: Report) -> str:
    record = report.record
    algorithms = ", ".join(f"{count} {name}" for name, count in record["algorithms"].items())
    missing = sum(module["norm"] is None for module in report.modules)
    without = f" · {missing} modules without a finite ΔW" if missing else ""
    parts = (
        record["family"] or "unknown family",
        record["format"],
        algorithms,
        f"‖ΔW‖ = {record['norm']:.3g}",
    )
    return safe(" · ".join(parts) + without)


def _names(page: _Page) -> None:
    for n, row in enumerate(page.rows):
        style: dict[str, Any] = {"fontweight": "bold"} if row.bold else {"ha": "right"}
        left = SIDE if row.bold else SIDE + NAMES - 0.1
        page.write(left, TOP + (n + 0.68) * ROW, safe(row.name), fontsize=SMALL, **style)


def _cells(page: _Page, left: float) -> None:
    """Draw the heat map and its scale."""
    from matplotlib.patches import Rectangle

    drawn = page.strip(left, len(page.kinds) * CELL)
    drawn.set_xlim(-0.5, len(page.kinds) - 0.5)
    drawn.set_xticks([])
    top = max(
        (v for row in page.rows if row.block for v in row.block["kinds"].values() if v), default=0.0
    )
    for k, kind in enumerate(page.kinds):
        page.write(left + (k + 0.5) * CELL, TOP - 0.08, kind, ha="center", fontsize=SMALL)
        for n, row in enumerate(page.rows):
            value = row.block["kinds"].get(kind) if row.block else None
            if row.block is None or value is None:
                continue
            share = value / top if top else 0.0
            gid = f"cell{len(page.tips)}"
            page.tips[gid] = f"{row.block['block']}, {kind}: {value:.3g}"
            step = round(share * (STEPS - 1))
            fill, ink = LIGHT.shade(step), LIGHT.on_shade(step)
            drawn.add_patch(
                Rectangle((k - 0.47, n - 0.46), 0.94, 0.92, facecolor=fill, lw=0, gid=gid)
            )
            drawn.text(
                k, n, percent(share), ha="center", va="center_baseline", fontsize=TINY, color=ink
            )
    _scale(page, left, top)


def _scale(page: _Page, left: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    below = TOP + len(page.rows) * ROW + 0.14
    drawn = page.axes(left, below, 1.2, 0.12)
    drawn.set(xlim=(0, STEPS), ylim=(0, 1), xticks=[], yticks=[])
    for n in range(STEPS):
        drawn.add_patch(Rectangle((n, 0), 1, 1, facecolor=LIGHT.shade(n), lw=0, antialiased=False))
    page.write(left - 0.06, below + 0.1, "0", ha="right", fontsize=TINY)
    page.write(left + 1.26, below + 0.1, f"100 = {top:.3g}", fontsize=TINY)
    page.write(
        left, below + 0.27, "root mean square of ‖ΔW‖ over the layers,", fontsize=TINY, color=MUTED
    )
    page.write(left, below + 0.38, "in % of the strongest cell", fontsize=TINY, color=MUTED)


def _bars(page: _Page, left: float) -> None:
    """Draw ‖ΔW‖ of every block."""
    drawn = page.strip(left, BARS)
    values = {
        n: row.block["norm"]
        for n, row in enumerate(page.rows)
        if row.block and row.block["norm"] is not None
    }
    top = max(values.values(), default=0.0) or 1.0
    drawn.set(xlim=(0, 1.42 * top), xticks=[])
    drawn.barh(list(values), list(values.values()), height=0.72, color=LINE)
    for n, value in values.items():
        drawn.text(value + 0.03 * top, n, short(value), va="center_baseline", fontsize=TINY)
    page.write(left, TOP - 0.08, "‖ΔW‖ of the block", fontsize=SMALL)


def _ranks(page: _Page, left: float) -> None:
    """Draw the median ranks per block for 90 % and 99 % of the energy."""
    from matplotlib.ticker import MaxNLocator

    drawn = page.strip(left, RANKS)
    found = [
        (n, row.block["rank_90"], row.block["rank_99"])
        for n, row in enumerate(page.rows)
        if row.block
    ]
    found = [(n, low, high) for n, low, high in found if low is not None]
    drawn.set_xticks([])
    if not found:
        return
    page.write(left, TOP - 0.08, "rank: ● 90 %  ○ 99 %", fontsize=SMALL)
    page.write(
        left,
        TOP + len(page.rows) * ROW + 0.41,
        "of ‖ΔW‖², median of the layers",
        fontsize=TINY,
        color=MUTED,
    )
    rows, lows, highs = zip(*found, strict=True)
    drawn.set_xlim(0, max(highs) * 1.08 + 0.5)
    drawn.grid(axis="x", color=MUTED, alpha=0.25, lw=0.5)
    drawn.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    drawn.hlines(rows, lows, highs, color=LINE, lw=2.2, alpha=0.45)
    drawn.plot(lows, rows, "o", color=LINE, ms=3.4)
    drawn.plot(highs, rows, "o", color=LINE, ms=3.4, mfc=PAPER)


def _spectra(page: _Page, left: float, report: Report) -> None:
    """Draw the median σ/σ₁ and its 80 % band for every list of blocks."""
    spectra = Spectra(page.groups)
    longest = spectra.longest
    height = min(max(len(page.rows) * ROW / len(spectra.bands), LEAST), MOST)
    page.write(
        left, TOP - 0.3, "singular values σᵢ / σ₁ of a layer", fontsize=SMALL + 1, fontweight="bold"
    )
    page.write(
        left, TOP - 0.14, "line: median · band: 80 % of the layers", fontsize=TINY, color=MUTED
    )
    for n, name in enumerate(spectra.bands):
        drawn = page.axes(left, TOP + n * height + 0.17, SPECTRUM, height - 0.42)
        _spectrum(drawn, spectra.shown(name), spectra.least)
        if longest > LONG:
            drawn.set(xscale="log", xlim=(1, longest))
            drawn.xaxis.set_major_formatter("{x:g}")
        else:
            drawn.set(xticks=counted(longest), xlim=(0.7, longest + 0.3))
        count = len(page.groups[name])
        layers = "1 layer" if count == 1 else f"{count} layers"
        drawn.set_title(
            f"{safe(name)}  ·  {layers}", fontsize=SMALL, loc="left", pad=3, parse_math=False
        )
    drawn.set_xlabel("i", fontsize=SMALL, labelpad=1)


def _spectrum(drawn: Axes, band: NDArray[Any], least: float) -> None:
    low, middle, high = band
    index = range(1, len(middle) + 1)
    drawn.set(yscale="log", ylim=(least, 1.3))
    drawn.grid(color=MUTED, alpha=0.25, lw=0.5)
    drawn.minorticks_off()
    # exponents would be too small to read
    drawn.yaxis.set_major_formatter("{x:g}")
    drawn.fill_between(index, low.clip(least / 2), high, color=LINE, alpha=0.25, lw=0)
    drawn.plot(
        index, middle, color=LINE, lw=1.4, marker="o", ms=2.5 if len(middle) <= LONG // 2 else 0
    )
