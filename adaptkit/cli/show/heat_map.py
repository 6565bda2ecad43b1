"""Heat map of `inspect --stats`: one line per block, one cell per kind of layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median_high
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.page import LABEL
from adaptkit.ops.blocks import KINDS, NUMBERED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.text import Text

__all__ = ["grouped", "heat_map", "percent", "short"]

# widths in characters
NAME, NARROW, NORM, RANK, CELL = 16, 7, 9, 5, 5
# titles of kinds with a name that is too long for a cell
TITLES = {"fused": "a+ff", "other": "etc"}
SHADES = " ░▒▓█"
# weak to strong, (red, green, blue): grey to vivid, visible on dark and light backgrounds
RAMP = ((150, 150, 150), (184, 158, 128), (222, 160, 76), (242, 122, 42), (216, 40, 40))
# weaker cells have no background
FAINT = 0.1


def grouped(blocks: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group blocks by their list, as `unet.down_blocks`; a block without a number is alone."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for block in blocks:
        numbered = NUMBERED.fullmatch(block["block"])
        found.setdefault(numbered[1] if numbered else block["block"], []).append(block)
    return found


@dataclass(frozen=True)
class Map:
    """Layout of the map: `kinds` are the columns, `top` is the strongest cell."""

    blocks: Sequence[Mapping[str, Any]]
    kinds: tuple[str, ...]
    left_out: tuple[str, ...]
    top: float
    name: int
    coloured: bool

    @classmethod
    def of(cls, blocks: Sequence[Mapping[str, Any]], width: int, coloured: bool) -> Map:
        """Fit the map to a width: move names to their own lines, then drop columns."""
        kinds = tuple(kind for kind in KINDS if any(kind in block["kinds"] for block in blocks))
        room = width - NORM - 2 * RANK - 1
        name = NAME if len(kinds) * CELL <= room - NAME else NARROW
        fits = max(1, (room - name) // CELL)
        values = [value for block in blocks for value in block["kinds"].values() if value]
        return cls(blocks, kinds[:fits], kinds[fits:], max(values, default=0.0), name, coloured)

    def head(self) -> Text:
        """Return the line of column names."""
        from rich.text import Text

        names = f"{'block':<{self.name}}{'‖ΔW‖':>{NORM}}{'r90':>{RANK}}{'r99':>{RANK}} "
        return Text(
            names + "".join(f"{TITLES.get(kind, kind):>{CELL - 1}} " for kind in self.kinds),
            style=LABEL,
        )

    def line(self, name: str, block: Mapping[str, Any]) -> Text:
        """Return the line of a block."""
        from rich.text import Text

        found = Text(f"{name:<{self.name}}{short(block['norm']):>{NORM}}")
        found.append(f"{short(block['rank_90']):>{RANK}}{short(block['rank_99']):>{RANK}} ")
        for kind in self.kinds:
            self._cell(found, block["kinds"], kind)
        for count, what, style in (
            (block["non_finite_tensors"], "NaN/inf", "bold red"),
            (block["zero_tensors"], "zero", "yellow"),
        ):
            if count:
                found.append(f" {count} {what}", style=style)
        return found

    def _cell(self, line: Text, kinds: Mapping[str, float | None], kind: str) -> None:
        value = kinds.get(kind)
        if value is None:
            line.append(f"{'–' if kind in kinds else '':^{CELL}}")
            return
        share = value / self.top if self.top else 0.0
        if self.coloured:
            line.append(f"{percent(share):>{CELL - 1}} ", style=colour(share))
        else:
            line.append(f"{shade(share)}{percent(share):>{CELL - 2}} ")

    def legend(self) -> Iterator[Text]:
        """Explain the numbers and their units."""
        from rich.text import Text

        steps = 10 if self.coloured else len(SHADES)
        ramp = Text("cells 0 ")
        for share in (n / (steps - 1) for n in range(steps)):
            ramp.append(
                "  " if self.coloured else shade(share),
                style=colour(share) if self.coloured else "",
            )
        yield ramp.append(f" 100 % of the strongest, {self.top:.3g}")
        yield Text("      root mean square of ‖ΔW‖ over the layers of a kind in a block")
        yield Text("r90   median rank that holds 90 % of ‖ΔW‖² of a layer; r99: 99 %")
        if self.left_out:
            yield Text(f"      not shown, terminal too narrow: {', '.join(self.left_out)}")


def heat_map(
    record: Mapping[str, Any], modules: Sequence[Mapping[str, Any]], width: int, coloured: bool
) -> Iterator[Text]:
    """Yield the lines of the map: the blocks by list, the total, the legend."""
    from rich.text import Text

    drawn = Map.of(record["blocks"], width, coloured)
    yield drawn.head()
    for name, members in grouped(record["blocks"]).items():
        if len(members) == 1 and members[0]["block"] == name and len(name) < drawn.name:
            line = drawn.line(name, members[0])
            line.stylize("bold", 0, len(name))
            yield line
            continue
        yield Text(name, style="bold")
        for block in members:
            number = block["block"].removeprefix(name)[1:] or ("all" if "." in name else "rest")
            yield drawn.line(f"{number:>5}", block)
    yield drawn.line("all", _everything(record, modules))
    yield Text()
    yield from drawn.legend()
    yield from _without(record, modules)


def _everything(record: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"norm": record["norm"], "kinds": {}}
    for name in ("rank_90", "rank_99"):
        ranks = [module[name] for module in modules if module[name] is not None]
        found[name] = median_high(ranks) if ranks else None
    for name in ("non_finite_tensors", "zero_tensors"):
        found[name] = sum(block[name] for block in record["blocks"])
    return found


def _without(record: Mapping[str, Any], modules: Iterable[Mapping[str, Any]]) -> Iterator[Text]:
    """Explain the modules that are intact but have no numbers."""
    from rich.text import Text

    wrong = {problem["module"] for problem in record["problems"] if problem["severity"] == "error"}
    found = Counter(
        m["algorithm"] for m in modules if m["norm"] is None and m["module"] not in wrong
    )
    for algorithm, count in found.items():
        yield Text(
            f"–     ΔW of {count} {algorithm} modules depends on the weights of the checkpoint"
        )


def short(value: float | None) -> str:
    """Format a number with three digits."""
    return "–" if value is None else f"{value:.3g}"


def percent(share: float) -> str:
    """Format a share in %, without the sign."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def shade(share: float) -> str:
    """Return a character that is darker for a larger share."""
    return SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))]


def colour(share: float) -> str:
    """Return the style of a cell, readable with any terminal colours."""
    if share < FAINT:
        return "dim"
    place = min((share - FAINT) / (1 - FAINT), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)
    )
    # black or white, whichever has more contrast with this luminance (WCAG 2)
    light = sum(
        w * (part / 255) ** 2.2
        for w, part in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
    )
    return f"{'#000000' if light > 0.179 else 'bold #ffffff'} on #{red:02x}{green:02x}{blue:02x}"
