"""The roles of adapter tensors: registered algorithms and the key suffixes they spell."""

from __future__ import annotations

from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from adaptkit.names import BIAS, WEIGHT
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.algorithms.contract import Weights

__all__ = ["RoleName", "algorithms", "param_of", "split_suffix"]


# prefixes of suffixes into which PEFT writes the adapter's name
_PEFT = (
    "lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_", "hira_", "hra_", "miss_", "bone_", "vera_",
    "fourierft_", "delora_", "glora_", "shira_", "randlora_", "gralora_", "road_", "waveft_",
    "psoft_", "ln_tuning_", "c3a_", "beft_", "osf_", "vblora_", "supertuning_", "deft_", "pvera_",
    "unilora_",
)  # fmt: skip


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


@cache
def _heads() -> frozenset[str]:
    """The first words of all suffixes."""
    return frozenset(suffix.partition(".")[0] for suffix in _suffixes())


@cache
def _dots() -> int:
    """The most dots in a suffix, and one for the name of an adapter."""
    return 1 + max(suffix.count(".") for suffix in _suffixes())


@lru_cache(maxsize=16384)
def split_suffix(key: str) -> tuple[str, str, tuple[RoleName, ...]] | None:
    """Split a key into (stem, suffix, roles), or None.

    The longest known suffix counts.
    """
    known = _suffixes()
    # only the last dots may begin a suffix; from the left, as the first one found is the longest
    parts = key.rsplit(".", _dots() + 1)
    heads = _heads()
    for first in range(1, len(parts)):
        if parts[first] not in heads:
            continue
        suffix = ".".join(parts[first:])
        found = suffix if suffix in known else _unnamed(suffix)
        if found in known:
            return _stem(key[: -len(suffix) - 1], found), found, known[found]
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
