"""The parts of a file's section: facts, problems, metadata, heat map, spectra, modules.

Every text of a file passes `text` or `lines`, which leave neither markup nor hidden characters.
"""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.heat_map import grouped, percent, short
from adaptkit.cli.show.inspect import MEASURED, OUTLYING, alike, facts_of, outlying
from adaptkit.cli.show.text import cell as shown
from adaptkit.cli.show.text import last, safe, safe_lines
from adaptkit.cli.show.web.colours import STEPS
from adaptkit.cli.show.web.spectra import LONG, Spectra, counted, groups
from adaptkit.ops.blocks import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from adaptkit.ops.inspect import Report

__all__ = ["cell", "heads", "lines", "long", "section", "text"]

# letters of a value of the metadata that are shown at once
_LONG = 400
# a picture that a browser draws without running anything
_PICTURE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+=*")
# of a spectrum, in CSS pixels: width, height, left, right, top, bottom
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 160, 42, 10, 8, 22
# labels of a logarithmic axis
_LABELS = 6


def text(value: object) -> str:
    """A text of a file in one line, as HTML, in attributes too."""
    return html.escape(safe(str(value)))


def lines(value: object) -> str:
    """A text that may have several lines, as HTML; other control characters are escaped."""
    return html.escape(safe_lines(str(value).replace("\r\n", "\n")))


def long(value: object, place: str | None = None) -> str:
    """A name that is cut to its column until it is pointed at, tapped or reached by Tab.

    With the id of a `place` it is a link to it.
    """
    tag, target = ("span", 'tabindex="0"') if place is None else ("a", f'href="#{place}"')
    return f'<{tag} class="long" {target} title="{text(value)}">{text(value)}</{tag}>'


def cell(shown: str, value: float | None = None, number: bool = False) -> str:
    """A cell of a table; `shown` is HTML, `value` what it is sorted by."""
    kind = ' class="number"' if number else ""
    by = "" if value is None else f' data-value="{value:.17g}"'
    return f"<td{kind}{by}>{shown}</td>"


def heads(names: Sequence[str], right: Sequence[str]) -> str:
    """The heads of a table that can be sorted."""
    return "".join(
        f'<th{" class=number" * (name in right)} scope="col">'
        f'<button type="button">{html.escape(name)}</button></th>'
        for name in names
    )


def section(report: Report, modules: bool) -> Iterator[str]:
    """What is shown of a file below its name, as HTML."""
    if report.error is not None:
        yield f'<p class="error">{text(report.error.message)}</p>'
        if report.error.hint:
            yield f"<p>{text(report.error.hint)}</p>"
        return
    record = report.record
    yield "<dl>"
    for name, value in facts_of(record):
        if value and name != "metadata":
            yield f"<dt>{text(name)}</dt><dd>{lines(value)}</dd>"
    yield "</dl>"
    for severity, what in alike(record["problems"]):
        yield f'<p><span class="{text(severity)}">{text(severity)}</span> {text(what)}</p>'
    if record.get("blocks"):
        yield from _heat_map(record)
        yield from _outliers(record.get("outliers", ()))
        yield from _spectra(report)
    if modules and report.modules:
        yield from _modules(report.modules)
    if record["metadata"]:
        yield from _metadata(record["metadata"])


def _metadata(metadata: Mapping[str, str]) -> Iterator[str]:
    yield '<h3>metadata</h3><div class="scroll" tabindex="0"><table class="metadata"><tbody>'
    for name, value in metadata.items():
        yield f'<tr><th scope="row">{text(name)}</th><td>{_value(value)}</td></tr>'
    yield "</tbody></table></div>"


def _value(value: str) -> str:
    if _PICTURE.fullmatch(value):
        return f'<img class="thumbnail" alt="thumbnail" src="{value}">'
    if len(value) <= _LONG:
        return lines(value)
    head = f"{text(value[: _LONG // 4])} … ({len(value):,} characters)"
    return f"<details><summary>{head}</summary>{lines(value)}</details>"


def _heat_map(record: Mapping[str, Any]) -> Iterator[str]:
    blocks = record["blocks"]
    kinds = [kind for kind in KINDS if any(kind in block["kinds"] for block in blocks)]
    top = max((v for block in blocks for v in block["kinds"].values() if v), default=0.0)
    yield f"<h3>strength by block and kind of layer</h3><p class=muted>{_scale(top)}</p>"
    yield '<div class="scroll" tabindex="0"><table class="map"><thead><tr>'
    yield "".join(f'<th scope="col">{name}</th>' for name in ("block", "‖ΔW‖", "r90", "r99"))
    yield (
        "".join(f'<th class="kind" scope="col">{kind}</th>' for kind in kinds)
        + "</tr></thead><tbody>"
    )
    for name, members in grouped(blocks).items():
        alone = len(members) == 1 and members[0]["block"] == name
        if not alone:
            wide = 4 + len(kinds)
            yield f'<tr class="list"><th scope="rowgroup" colspan="{wide}">{text(name)}</th></tr>'
        for block in members:
            number = block["block"].removeprefix(name)[1:] or ("all" if "." in name else "rest")
            shown, style = (name, ' class="list"') if alone else (number, "")
            yield f'<tr{style}><th scope="row">{text(shown)}</th>{_row(block, kinds, top)}</tr>'
    yield "</tbody></table></div>"


def _scale(top: float) -> str:
    return (
        f"Cells: root mean square of ‖ΔW‖ over the layers, 100 = {top:.3g}. "
        "r90, r99: median rank that holds 90 and 99 % of ‖ΔW‖² of a layer."
    )


def _row(block: Mapping[str, Any], kinds: Sequence[str], top: float) -> str:
    found = [f"<td>{short(block[name])}</td>" for name in ("norm", "rank_90", "rank_99")]
    for kind in kinds:
        value = block["kinds"].get(kind)
        if value is None:
            found.append(f"<td>{'–' if kind in block['kinds'] else ''}</td>")
            continue
        share = value / top if top else 0.0
        where = f"{text(block['block'])}, {kind}: {value:.3g}"
        step = round(share * (STEPS - 1))
        found.append(f'<td class="shade s{step}" title="{where}">{percent(share)}</td>')
    return "".join(found)


def _outliers(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield '<h3>stand out of their kind <span class="muted">(which says not why)</span></h3>'
    yield '<div class="scroll" tabindex="0"><table class="sorted">'
    yield f"<thead><tr>{heads(OUTLYING, OUTLYING[2:5])}</tr></thead><tbody>"
    for one in found:
        kind, figure, value, median, score, module = outlying(one)
        numbers = ((value, one["value"]), (median, one["median"]), (score, one["score"]))
        cells = "".join(cell(text(shown), number, number=True) for shown, number in numbers)
        yield f"<tr>{cell(text(kind))}{cell(figure)}{cells}{cell(long(module))}</tr>"
    yield "</tbody></table></div>"


def _spectra(report: Report) -> Iterator[str]:
    lists = groups(report)
    if not lists:
        return
    spectra = Spectra(lists)
    yield (
        "<h3>singular values σᵢ / σ₁ of a layer</h3>"
        '<p class="muted">line: median · band: 80 % of the layers</p><div class="spectra">'
    )
    for name, layers in lists.items():
        count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        yield f"<figure><figcaption>{text(name)} · {count}</figcaption>"
        yield f"{_curve(spectra, name)}</figure>"
    yield "</div>"


def _curve(spectra: Spectra, name: str) -> str:
    low, middle, high = spectra.shown(name).tolist()
    x, y = _axes(spectra)
    upper = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in enumerate(high, 1))
    lower = " ".join(f"{x(n):.1f},{y(low[n - 1]):.1f}" for n in range(len(low), 0, -1))
    line = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in enumerate(middle, 1))
    dot = f'<circle cx="{x(1):.1f}" cy="{y(1):.1f}" r="2.5" fill="var(--line)"/>'
    drawn = f'<polyline class="middle" points="{line}"/>{dot if len(middle) == 1 else ""}'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="spectrum of {text(name)}">'
        f'<polygon class="band" points="{upper} {lower}"/>'
        f"{drawn}{''.join(_grid(spectra))}</svg>"
    )


def _grid(spectra: Spectra) -> Iterator[str]:
    """Lines at powers of ten and at round numbers, with their labels."""
    x, y = _axes(spectra)
    decades = round(-math.log10(spectra.least))
    rows = [10.0**-n for n in range(0, decades + 1, math.ceil(decades / _LABELS))]
    across = "".join(f"M{_LEFT},{y(v):.1f}H{_WIDTH - _RIGHT}" for v in rows)
    columns = _columns(spectra.longest)
    down = "".join(f"M{x(n):.1f},{_TOP}V{_HEIGHT - _BOTTOM}" for n in columns)
    yield f'<path class="grid" d="{across}{down}"/>'
    for v in rows:
        yield f'<text x="{_LEFT - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
    for n in columns:
        yield f'<text x="{x(n):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{n}</text>'


def _axes(spectra: Spectra) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Places in the drawing of a number i and of a share σᵢ/σ₁."""
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    longest, least = spectra.longest, spectra.least
    scale = math.log if longest > LONG else float
    first, last = scale(1), max(scale(longest), scale(1) + 1e-9)

    def x(n: float) -> float:
        return _LEFT + wide * (scale(n) - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + tall * math.log(max(value, least)) / math.log(least)

    return x, y


def _columns(longest: int) -> list[int]:
    if longest <= LONG:
        return counted(longest)
    return [4**n for n in range(math.floor(math.log(longest, 4)) + 1)]


def _modules(modules: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    # those of a checkpoint are places, without measures
    named = MEASURED if "norm" in modules[0] else {key: key for key in modules[0]}
    columns = {key: named[key] for key in last(list(named), "module")}
    right = [name for key, name in columns.items() if isinstance(modules[0][key], int | float)]
    yield '<h3>modules</h3><div class="scroll" tabindex="0"><table class="sorted">'
    yield f"<thead><tr>{heads(list(columns.values()), right)}</tr></thead><tbody>"
    for module in modules:
        yield "<tr>" + "".join(_measured(module[key], key) for key in columns) + "</tr>"
    yield "</tbody></table></div>"


def _measured(value: object, key: str) -> str:
    if key in ("module", "key"):
        return cell(long(value))
    if isinstance(value, int | float):
        return cell(f"{value:.3g}" if isinstance(value, float) else str(value), value, number=True)
    return cell("–", -1.0, number=True) if value is None else cell(text(shown(value)))
