"""The roles of adapter tensors: registered algorithms and the key suffixes they spell."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from adaptkit.names import BIAS, WEIGHT
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.algorithms.contract import Weights

__all__ = ["RoleName", "algorithms", "param_of", "split_suffix"]


_DOTS = re.compile(r"\.")


# prefixes of suffixes into which PEFT writes the adapter's name
_PEFT = ("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_")


RoleName = tuple[str, str]  # (algorithm, role)


@cache
def algorithms() -> Mapping[str, type[Weights]]:
    """All algorithms by name; wrappers once per wrapped one (`lora+dora`)."""
    kinds: Mapping[str, type[Weights]] = discover("adaptkit.algorithms", "ALGORITHM")
    found = {name: kind for name, kind in kinds.items() if not kind.wraps}
    for kind in kinds.values():
        composed = [kind.over(kinds[inner]) for inner in kind.wraps]
        found |= {one.name: one for one in composed}
    return MappingProxyType(found)


def param_of(role: RoleName) -> str:
    """The parameter (`weight`, `bias`) that a role adapts."""
    algorithm, name = role
    return algorithms()[algorithm].roles[name].param


@cache
def _suffixes() -> Mapping[str, tuple[RoleName, ...]]:
    """All key suffixes that an algorithm or format spells, with their possible roles."""
    found: dict[str, list[RoleName]] = {}
    overrides = [format.spelling for format in discover("adaptkit.formats", "FORMAT").values()]
    for algorithm, kind in algorithms().items():
        # kinds without forms are told by a configuration, never by their tensors
        for name, role in kind.roles.items() if kind.forms else ():
            spelled = [spelling.get(algorithm, {}).get(name) for spelling in overrides]
            also = (*role.also, *(suffix for suffix, _ in role.inside), *filter(None, spelled))
            for suffix in dict.fromkeys((role.spelling, *also)):
                found.setdefault(suffix, []).append((algorithm, name))
    return {suffix: tuple(roles) for suffix, roles in found.items()}


@lru_cache(maxsize=65536)
def split_suffix(key: str) -> tuple[str, str, tuple[RoleName, ...]] | None:
    """Split a key into (stem, suffix, roles), or None.

    The longest known suffix counts.
    """
    known = _suffixes()
    # from the left: the first known suffix is the longest
    for dot in _DOTS.finditer(key):
        suffix = key[dot.end() :]
        if suffix in known:
            return _stem(key[: dot.start()], suffix), suffix, known[suffix]
        plain = _unnamed(suffix)
        if plain in known:
            return key[: dot.start()], plain, known[plain]
    return None


@cache
def _inside() -> Mapping[str, str]:
    """The parameter inside a module that a suffix stands for."""
    return {
        suffix: param
        for kind in algorithms().values()
        for role in kind.roles.values()
        for suffix, param in role.inside
    }


def _stem(stem: str, suffix: str) -> str:
    """The stem of a key, with the parameter that its suffix stands for."""
    inside = _inside().get(suffix)
    if inside is None:
        return stem
    return f"{stem}{'.' if '.' in stem else '_'}{inside}"


def _unnamed(suffix: str) -> str:
    """Remove the adapter's name from a PEFT suffix: `lora_A.default.weight` → `lora_A.weight`."""
    if not suffix.startswith(_PEFT):  # first: most suffixes are parts of a module's name
        return ""
    first, *rest = suffix.split(".")
    if not rest or rest[0] in (WEIGHT, BIAS) or len(rest) > 2:
        return ""
    return ".".join((first, *rest[1:]))
