"""Families without a table, made of the module names in a file.

They suffice if names need no translation: to inspect, resize, change the algorithm, or spell the
same names in another format. Names are carried over only between formats that name modules alike,
and never from underscores back to dots.
"""

from __future__ import annotations

import re
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from adaptkit.detect import families, formats
from adaptkit.families.contract import Component, Kind, ModelFamily, Row, named
from adaptkit.files.open import COMPONENTS
from adaptkit.keymap import prefixes, split_suffix
from adaptkit.names import BIAS, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adaptkit.formats.contract import KeyFormat

__all__ = ["NAME", "fallback", "family_of_weights"]

NAME = "unknown"
DENOISERS = ("transformer", "unet")
SOURCE, NOWHERE = "source", "nowhere"
TITLE = "an unknown family"

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")  # in single files
_TABLES = re.compile(
    r"(^|[._])((word|token|token_type|position)_embeddings?|embed_tokens|wte|wpe|shared)$"
)
_BESIDE = tuple(
    p for found in ModelFamily(name="", title="", components=()).others.values() for p in found
)
_ENCODERS = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"}


def fallback(
    names: Iterable[str], format: str | None = None
) -> tuple[ModelFamily, KeyFormat, int] | None:
    """Build a family from adapter keys: (family, format that spells them, claimed keys)."""
    stems = Counter(found[0] for name in names if (found := split_suffix(name)) is not None)
    known = [
        f for f in formats().values() if not f.private and not f.owns and format in (None, f.name)
    ]
    best = max(known, key=lambda f: (_claimed(stems, f), "" not in _parts(f)), default=None)
    if best is None or not _claimed(stems, best):
        return None
    return _family(stems, best), best, _claimed(stems, best)


def _claimed(stems: Mapping[str, int], format: KeyFormat) -> int:
    starts = tuple(_parts(format))
    return sum(n for stem, n in stems.items() if stem.startswith(starts))


def _parts(format: KeyFormat) -> dict[str, str]:
    """Map each prefix to its component over all families.

    Prefixes that mean several components map to the denoiser.
    """
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
    return ModelFamily(name=NAME, title=TITLE, components=components)


def _component(name: str, modules: Iterable[str], format: KeyFormat) -> Component:
    names = [{SOURCE: (named(module),), NOWHERE: (), "diffusers": ()} for module in modules]
    rows = tuple(Row(names[SOURCE][0].module, MappingProxyType(names)) for names in names)
    return Component(
        name=name,
        title="denoiser" if name in DENOISERS else name.replace("_", " "),
        rows=rows,
        checkpoints={},
        tags=_tags(name, format),
        namings=dict.fromkeys((f.style for f in formats().values()), NOWHERE)
        | {f.style: SOURCE for f in formats().values() if _alike(f, format)},
    )


def _alike(format: KeyFormat, source: KeyFormat) -> bool:
    """Whether a format can spell the names of a source format."""
    if format is source:
        return True
    return format.kin == source.kin != "" and source.joiner in (".", format.joiner)


def _tags(component: str, source: KeyFormat) -> dict[str, tuple[str, ...]]:
    """The tags of a component that families agree on.

    Plus all tags that the source's prefixes need.
    """
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


# checkpoints ----------------------------------------------------------------------------


def family_of_weights(*files: Mapping[str, tuple[int, ...]]) -> ModelFamily:
    """Build a family from the weights and biases in files (key → shape).

    Every format spells these names after its prefix, kohya with underscores for dots. Modules that
    differ only in dots and underscores are skipped: such a key would be ambiguous.
    """
    # component → module → shape of its weight
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    starts: dict[str, dict[str, None]] = {}
    for shapes in files:
        parts = _weight_parts(shapes)
        for name, shape in shapes.items():
            prefix = next((p for p in parts if name.startswith(p)), None)
            if prefix is None or name.startswith(_BESIDE):
                continue
            module, _, param = name[len(prefix) :].rpartition(".")
            if module and param in (WEIGHT, BIAS):
                starts.setdefault(parts[prefix], {})[prefix] = None
                known = modules.setdefault(parts[prefix], {})
                known[module] = shape if param == WEIGHT else known.get(module, (1, 1))
    components = tuple(
        _weighed(name, found, tuple(starts[name])) for name, found in modules.items()
    )
    return ModelFamily(name=NAME, title=TITLE, components=components)


def _weight_parts(names: Iterable[str]) -> dict[str, str]:
    """Map prefixes to components: the folders of a pipeline, or else one denoiser."""
    names = list(names)
    folders = {name.partition(".")[0] for name in names}
    if folders <= set(COMPONENTS):
        return {f"{folder}.": folder for folder in COMPONENTS if folder in folders}
    prefix = next(p for p in _DENOISER_PREFIXES if any(name.startswith(p) for name in names))
    return {prefix: DENOISERS[0]}


def _weighed(
    name: str, modules: Mapping[str, tuple[int, ...]], starts: tuple[str, ...]
) -> Component:
    # `a.b_c` and `a_b.c` would be one key in kohya's spelling
    alike = Counter(module.replace(".", "_") for module in modules)
    rows = [
        _row(module, shape)
        for module, shape in modules.items()
        if alike[module.replace(".", "_")] == 1
    ]
    tags = {"diffusers": (name,), "onetrainer": (name,)}
    if name in _ENCODERS:
        tags |= {"kohya": (_ENCODERS[name],)}
    else:
        tags |= {"kohya": ("unet",), "comfy": ("diffusion_model",), "root": ("",)}
    return Component(
        name=name,
        title="denoiser" if name in DENOISERS else name.replace("_", " "),
        rows=tuple(rows),
        checkpoints={SOURCE: starts},
        tags=tags,
        namings={format.style: SOURCE for format in formats().values()},
    )


def _row(module: str, shape: tuple[int, ...]) -> Row:
    kind = (
        Kind.NORM if len(shape) < 2 else (Kind.EMBEDDING if _TABLES.search(module) else Kind.MATRIX)
    )
    names = MappingProxyType({SOURCE: (named(module),), "diffusers": (named(module),)})
    return Row(module, names, kind, shape[2:])
