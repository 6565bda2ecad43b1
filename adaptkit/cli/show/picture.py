"""Reproducible .png, .svg and .html files, drawn with matplotlib (extra `adaptkit[plot]`)."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from adaptkit.cli.show.text import safe
from adaptkit.errors import AdaptkitError, CannotWrite, WouldOverwrite
from adaptkit.files.leftovers import hidden, remove_dead
from adaptkit.ops.shared import check_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
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
    "option",
    "publish",
    "rendered",
    "settings",
]

SUFFIXES = (".png", ".svg", ".html")
# unique in a drawing, so that HTML can replace them
INK, MUTED, PAPER = "#1f2329", "#6e7681", "#fefefe"
LINE = "#3f7fbf"
# font sizes in points
SMALL, TINY = 7.5, 6.3


def option(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse an unsupported suffix (callback of `--plot`)."""
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise click.BadParameter(
            f"{path.name!r} does not end in one of {', '.join(SUFFIXES)}", context, parameter
        )
    return path


def check(path: Path, overwrite: bool) -> None:
    """Refuse an impossible picture before any weights are read."""
    _check_output(path, overwrite)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise AdaptkitError(
            f"--plot needs matplotlib: {error}",
            hint='install it with: pip install "adaptkit[plot]"',
        ) from None


def publish(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a picture completely or not at all."""
    # the file may have appeared in the meantime
    _check_output(path, overwrite)
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


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise WouldOverwrite(
            "the picture already exists", hint="pass --overwrite to replace it", file=path
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
    return svg if suffix == ".svg" else _html(svg.decode(), title, tips).encode()


@contextmanager
def settings() -> Iterator[None]:
    """Ignore the user's matplotlibrc and use no random ids."""
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


def _html(svg: str, title: str, tips: Mapping[str, str]) -> str:
    """Return a page with the inline drawing, in light or dark colours as the reader prefers."""
    import html

    svg = svg[svg.index("<svg") :]
    # HTML knows the namespaces
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(
        r'<g id="(cell\d+)">',
        lambda found: f"{found[0]}<title>{html.escape(safe(tips[found[1]]))}</title>",
        svg,
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(safe(title))}</title>
<style>
:root {{ color-scheme: light dark; --ink: {INK}; --muted: {MUTED}; --paper: {PAPER}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --muted: #98a0aa; --paper: #16181d; }}
}}
body {{ margin: 1rem auto; max-width: 78rem; padding: 0 1rem; background: var(--paper); }}
svg {{ width: 100%; height: auto; }}
text {{ pointer-events: none; }}
</style>
{svg}</html>
"""
