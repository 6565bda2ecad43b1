"""Reproducible .png, .svg and .html files, drawn with matplotlib (extra `adaptkit[plot]`)."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from adaptkit.cli.show.text import safe
from adaptkit.cli.show.web.colours import INK, LINE, MUTED, PAPER, themed, variables
from adaptkit.errors import AdaptkitError, CannotWrite, WouldOverwrite
from adaptkit.files.leftovers import hidden, remove_dead
from adaptkit.ops.shared import check_output

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "LINE",
    "MUTED",
    "PAPER",
    "SMALL",
    "SUFFIXES",
    "TINY",
    "check",
    "may_write",
    "option",
    "publish",
    "rendered",
    "settings",
]

SUFFIXES = (".png", ".svg", ".html")
# font sizes in points
SMALL, TINY = 7.5, 6.3
# what DejaVu Sans lacks begins here; the fonts of the systems that have it
FAR_EAST = "\u2e80"
CJK = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)
# a page shows drawings so much larger than they are printed
LARGER = 1.3


def option(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    """Refuse an unsupported suffix (callback of `--plot`)."""
    if path.suffix.lower() not in SUFFIXES:
        raise click.BadParameter(
            f"{path.name!r} does not end in one of {', '.join(SUFFIXES)}", context, parameter
        )
    return path


def check(path: Path, overwrite: bool) -> None:
    """Refuse an impossible picture before any weights are read."""
    may_write(path, overwrite)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise AdaptkitError(
            f"--plot needs matplotlib: {error}",
            hint='install it with: pip install "adaptkit[plot]"',
        ) from None


def publish(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a picture or page completely or not at all."""
    # the file may have appeared in the meantime
    may_write(path, overwrite)
    remove_dead(path)
    temporary = hidden(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(f"cannot be written: {error.strerror or error}", file=path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def may_write(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists or cannot be written there, before any weights are read."""
    if path.exists() and not overwrite:
        raise WouldOverwrite(
            "the file already exists", hint="pass --overwrite to replace it", file=path
        )
    check_output(path, overwrite)


def rendered(figure: Figure, suffix: str, title: str, tips: Mapping[str, str]) -> bytes:
    """Return the bytes of a file with this suffix; call within `settings`.

    `tips` maps the ids of groups to their tooltips on a page.
    """
    out = io.BytesIO()
    if suffix == ".png":
        figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
        return out.getvalue()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=suffix == ".html", metadata=nothing)
    svg = out.getvalue()
    if suffix == ".svg":
        return svg
    return _html(svg.decode(), title, tips, figure.get_figwidth()).encode()


@contextmanager
def settings(*texts: str) -> Iterator[None]:
    """Ignore the user's matplotlibrc and use no random ids.

    `texts` are what may need other fonts than the one that comes with matplotlib.
    """
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        # the font may lack the script of a file name
        warnings.filterwarnings("ignore", message="Glyph")
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.hashsalt": "adaptkit",
                "svg.fonttype": "none",
                "font.size": SMALL,
                "font.family": ["DejaVu Sans", *_fonts(texts)],
                "text.color": INK,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.linewidth": 0.6,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "figure.facecolor": PAPER,
                "axes.facecolor": "none",
            }
        )
        yield


def _fonts(texts: Iterable[str]) -> list[str]:
    """The installed fonts for scripts of the far east, where a text needs one."""
    if all(letter < FAR_EAST for text in texts for letter in text):
        return []
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [name for name in CJK if name in installed]


def _html(svg: str, title: str, tips: Mapping[str, str], inches: float) -> str:
    """Return a page with the inline drawing, in light or dark colours as the reader prefers."""
    import html

    svg = svg[svg.index("<svg") :]
    # HTML knows the namespaces
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )
    svg = re.sub(
        r'<g id="(cell\d+)">',
        lambda found: f"{found[0]}<title>{html.escape(safe(tips[found[1]]))}</title>",
        svg,
    )
    # a narrow screen scrolls: scaled down to it, the text could not be read
    width = round(96 * LARGER * inches)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(safe(title))}</title>
<style>
{variables()}body {{ background: var(--paper); }}
body {{ margin: 1rem auto; max-width: 78rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
svg {{ width: 100%; min-width: {width}px; height: auto; }}
text {{ pointer-events: none; }}
</style>
<div tabindex="0">
{themed(svg)}</div>
</html>
"""
