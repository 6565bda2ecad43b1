"""Colours of pages and pictures in two themes, and the contrast of text on them.

Every colour is opaque, so that the contrast of a text can be computed from two of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "DARK",
    "FONTS",
    "INK",
    "LEAST",
    "LIGHT",
    "LINE",
    "MUTED",
    "PAPER",
    "STEPS",
    "Theme",
    "contrast",
    "themed",
    "variables",
]

# shades of a heat map, from 0 to the strongest
STEPS = 21
# the least contrast of a text to what is behind it (WCAG 2.2, level AA)
LEAST = 4.5
# red, green, blue of the weakest and the strongest shade
_WEAK, _STRONG = (245, 173, 71), (222, 43, 38)
# the fonts of the systems, then those for Chinese, Japanese and Korean
FONTS = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Hiragino Sans", '
    '"Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans CJK SC", "Noto Sans CJK JP", '
    '"Noto Sans CJK KR", sans-serif'
)
# a shade of 0 is nearly the paper
_FAINT = 0.06


class Theme(NamedTuple):
    """The colours of a page as #rrggbb."""

    paper: str
    raised: str
    edge: str
    ink: str
    muted: str
    line: str
    error: str
    warning: str
    accent: str

    def shade(self, step: int) -> str:
        """The background of a cell of the heat map; `step` is below `STEPS`."""
        share = step / (STEPS - 1)
        vivid = [a + (b - a) * share for a, b in zip(_WEAK, _STRONG, strict=True)]
        amount = _FAINT + (1 - _FAINT) * share
        mixed = (a + (b - a) * amount for a, b in zip(_parts(self.paper), vivid, strict=True))
        return "#" + "".join(f"{round(part):02x}" for part in mixed)

    def on_shade(self, step: int) -> str:
        """The colour of a text on a shade: nearly black or nearly white, another one per step.

        A drawing holds each colour once, so that a page can replace it by that of its theme.
        """
        dark, light = f"#0000{step:02x}", f"#ffff{255 - step:02x}"
        return max(dark, light, key=lambda ink: contrast(ink, self.shade(step)))

    def named(self) -> dict[str, str]:
        """Every colour by its name in CSS, the shades as `s0` and the texts on them as `t0`."""
        shades = {f"s{n}": self.shade(n) for n in range(STEPS)}
        return {**self._asdict(), **shades, **{f"t{n}": self.on_shade(n) for n in range(STEPS)}}


LIGHT = Theme(
    paper="#fefefe",
    raised="#f3f5f7",
    edge="#d4d9df",
    ink="#1f2329",
    muted="#626a74",
    line="#3f7fbf",
    error="#b3261e",
    warning="#855300",
    accent="#a34d00",
)
DARK = Theme(
    paper="#16181d",
    raised="#20242b",
    edge="#3a414b",
    ink="#e6e8eb",
    muted="#a1a9b3",
    line="#6ea8dc",
    error="#ff8a80",
    warning="#f0b455",
    accent="#f29a4f",
)
# of a drawing, which is made in the light theme
INK, MUTED, PAPER, LINE = LIGHT.ink, LIGHT.muted, LIGHT.paper, LIGHT.line


def variables() -> str:
    """The colours as CSS variables, in light or dark as the reader prefers."""
    light, dark = (
        " ".join(f"--{name}: {colour};" for name, colour in theme.named().items())
        for theme in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def themed(drawing: str) -> str:
    """Replace the colours of a drawing in the light theme by the variables."""
    names = {colour: name for name, colour in LIGHT.named().items()}
    return re.sub(
        "#[0-9a-f]{6}",
        lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0],
        drawing,
    )


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2, `contrast ratio`)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in _parts(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
