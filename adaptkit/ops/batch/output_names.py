"""Names of outputs: `out/{base}-{adapter}-{strength:.2f}.safetensors`."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NoSuchName, WrongUsage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["filled", "stem"]

FORBIDDEN = re.compile(r'[\x00-\x1f<>:"/\\|?*]')  # in file names, on one system or another


def filled(template: str, names: Mapping[str, Any], place: str) -> str:
    """The template with each `{name}` or `{name:format}` replaced; `{{` stands for `{`."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise WrongUsage(
            f"{place}: output {template!r}: {error}", hint="write {{ for a brace in the name"
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
        raise WrongUsage(
            f"{place}: {{{name}}} in its output has no value here", hint=f"give {name}"
        )
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
    """`models/style.v2.safetensors` → `style.v2`; the name of a folder; an index of shards without its ending."""
    known = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    name = (path if path.name else path.resolve()).name.removesuffix(".index.json")
    return name.rpartition(".")[0] if name.endswith(known) else name
