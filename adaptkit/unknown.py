"""A family nobody has a table for: its modules are those the file names.

Enough wherever names need no translation: inspecting, resizing, another algorithm, another spelling of the same names.
Names are carried between formats only where these name modules alike, and never from underscores back to dots.
"""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from adaptkit.detect import families, formats
from adaptkit.families._family import Component, ModelFamily, Row, named
from adaptkit.keymap import prefixes, split_suffix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adaptkit.formats._format import KeyFormat

__all__ = ["NAME", "fallback"]

NAME = "unknown"
DENOISERS = ("transformer", "unet")
ALIKE = (("kohya", "comfy"), ("diffusers", "onetrainer", "lycoris"), ("peft", "bare"))  # styles that name modules alike
SOURCE, NOWHERE = "source", "nowhere"


def fallback(names: Iterable[str], format: str | None = None) -> tuple[ModelFamily, KeyFormat, int] | None:
    """A family made of the modules these keys name, the format that spells them, and how many keys that claims."""
    stems = Counter(found[0] for name in names if (found := split_suffix(name)) is not None)
    known = [f for f in formats().values() if not f.private and not f.owns and format in (None, f.name)]
    best = max(known, key=lambda f: (_claimed(stems, f), "" not in _parts(f)), default=None)
    if best is None or not _claimed(stems, best):
        return None
    return _family(stems, best), best, _claimed(stems, best)


def _claimed(stems: Mapping[str, int], format: KeyFormat) -> int:
    starts = tuple(_parts(format))
    return sum(n for stem, n in stems.items() if stem.startswith(starts))


def _parts(format: KeyFormat) -> dict[str, str]:
    """Prefix → the component it means, over all families; the denoiser of most where they differ."""
    found: dict[str, str] = {}
    for family in families().values():
        for part in family.components:
            for prefix in prefixes(part, format):
                if found.get(prefix) != DENOISERS[0]:
                    found[prefix] = part.name
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _family(stems: Iterable[str], format: KeyFormat) -> ModelFamily:
    parts = _parts(format)
    modules: dict[str, dict[str, None]] = {}
    for stem in stems:
        prefix = next((p for p in parts if stem.startswith(p)), None)
        if prefix is not None:
            modules.setdefault(parts[prefix], {})[stem[len(prefix) :]] = None
    components = tuple(_component(name, found, format) for name, found in modules.items())
    return ModelFamily(name=NAME, title="an unknown family", components=components)


def _component(name: str, modules: Iterable[str], format: KeyFormat) -> Component:
    names = [{SOURCE: (named(module),), NOWHERE: (), "diffusers": ()} for module in modules]
    rows = tuple(Row(names[SOURCE][0].module, MappingProxyType(names)) for names in names)
    return Component(
        name=name,
        title="denoiser" if name in DENOISERS else name.replace("_", " "),
        rows=rows,
        checkpoints={},
        tags=_tags(name, format),
        namings={f.style: SOURCE if _alike(f, format) else NOWHERE for f in formats().values()},
    )


def _alike(format: KeyFormat, source: KeyFormat) -> bool:
    """Whether a format can spell the names that this source has."""
    if format is source:
        return True
    group = next((group for group in ALIKE if source.style in group), ())
    return format.style in group and source.joiner in (".", format.joiner)


def _tags(component: str, source: KeyFormat) -> dict[str, tuple[str, ...]]:
    """The tags on which all families that have this component agree; all of those that the source's prefixes need."""
    found: dict[str, dict[tuple[str, ...], None]] = {}
    for family in families().values():
        for part in family.components:
            if part.name == component:
                for tag, values in part.tags.items():
                    found.setdefault(tag, {})[values] = None
    needed = {template.partition("{")[2].partition("}")[0] for template in source.prefixes}
    return {
        tag: tuple(dict.fromkeys(value for values in groups for value in values))
        for tag, groups in found.items()
        if len(groups) == 1 or tag in needed
    }
