"""Templates of output names: `out/{base}-{adapter}-{strength:.2f}.safetensors`."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NoSuchName, WrongUsage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["filled", "stem"]

# characters that some system forbids in file names, or that hide what a name is
FORBIDDEN = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]'
)
# names that Windows keeps for devices, with any suffix
DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\.|$)", re.IGNORECASE)
# numbers in a format: {adapter:>3000000000} would fill the memory
WIDE = re.compile(r"\d{3,}")
LONGEST = 200  # characters of a file name; most systems take 255 bytes


def filled(template: str, names: Mapping[str, Any], place: str) -> str:
    """Replace each `{name}` or `{name:format}` of a template; `{{` stands for `{`."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise WrongUsage(
            f"{place}: output {template!r}: {error}", hint="write {{ for a brace in a name"
        ) from None
    found = "".join(
        before + _value(names, name, form or "", place) for before, name, form, _ in pieces
    )
    _check_portable(found, place)
    return found


def _check_portable(path: str, place: str) -> None:
    """Refuse a name that some system cannot hold."""
    for name in re.split(r"[/\\]", path):
        if len(name) > LONGEST:
            shown = f"{name[:40]}…"
            hint = f"file names may take {LONGEST} characters"
            raise WrongUsage(f"{place}: the output {shown} has {len(name)} characters", hint=hint)
        if DEVICES.match(name) or (name.endswith((".", " ")) and name not in (".", "..")):
            hint = "add another word to the name"
            raise WrongUsage(f"{place}: Windows cannot hold a file named {name!r}", hint=hint)


def _value(names: Mapping[str, Any], name: str | None, form: str, place: str) -> str:
    if name is None:
        return ""
    if name not in names:
        error = NoSuchName.among("name", f"{{{name}}}", [f"{{{known}}}" for known in names])
        raise NoSuchName(f"{place}: {error.message} in its output", hint=error.hint)
    if WIDE.search(form):
        raise WrongUsage(f"{place}: {{{name}:{form}}} in its output is wider than 99 characters")
    value = names[name]
    if value is None or value == ():
        raise WrongUsage(f"{place}: {{{name}}} in its output has no value here", hint=f"set {name}")
    try:
        text = _spelled(value) if not form else format(value, form)
    except (ValueError, TypeError, OverflowError) as error:
        raise WrongUsage(f"{place}: {{{name}:{form}}} in its output: {error}") from None
    return FORBIDDEN.sub("_", text)


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_spelled, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def stem(path: Path) -> str:
    """Return the name of a file without its known suffix, or of a folder.

    `models/style.v2.safetensors` gives `style.v2`.
    """
    known = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
    name = (path if path.name else path.resolve()).name.removesuffix(".index.json")
    return name.rpartition(".")[0] if name.endswith(known) else name
