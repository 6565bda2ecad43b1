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

# characters that some system forbids in file names
FORBIDDEN = re.compile(r'[\x00-\x1f<>:"/\\|?*]')


def filled(template: str, names: Mapping[str, Any], place: str) -> str:
    """Replace each `{name}` or `{name:format}` of a template; `{{` stands for `{`."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise WrongUsage(
            f"{place}: output {template!r}: {error}", hint="write {{ for a brace in a name"
        ) from None
    return "".join(
        before + _value(names, name, form or "", place) for before, name, form, _ in pieces
    )


def _value(names: Mapping[str, Any], name: str | None, form: str, place: str) -> str:
    if name is None:
        return ""
    if name not in names:
        error = NoSuchName.among("name", f"{{{name}}}", [f"{{{known}}}" for known in names])
        raise NoSuchName(f"{place}: {error.message} in its output", hint=error.hint)
    value = names[name]
    if value is None or value == ():
        raise WrongUsage(f"{place}: {{{name}}} in its output has no value here", hint=f"set {name}")
    try:
        text = _spelled(value) if not form else format(value, form)
    except (ValueError, TypeError) as error:
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
    known = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    name = (path if path.name else path.resolve()).name.removesuffix(".index.json")
    return name.rpartition(".")[0] if name.endswith(known) else name
