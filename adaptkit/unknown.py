"""Families without a table, and modules without a row in their family's table.

Both are made of the names in a file. These suffice if names need no translation: to inspect,
resize, combine, merge, change the algorithm, or spell the same names in another format. Names are
carried over only between formats that name modules alike, and never from underscores back to dots.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.detect import families, formats, spelled_as_adapter
from adaptkit.errors import NotRepresentable
from adaptkit.families.contract import Component, Kind, ModelFamily, Row, named
from adaptkit.files.header import BLOCKED
from adaptkit.files.open import COMPONENTS
from adaptkit.files.quantized import FLOATS, FP8
from adaptkit.keymap import find_row, module_names, prefixes, split_suffix
from adaptkit.names import BIAS, WEIGHT, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adaptkit.files.header import TensorInfo
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.keymap import CheckpointMap, KeyMap

__all__ = [
    "NAME",
    "Own",
    "fallback",
    "family_of_weights",
    "joint",
    "own_modules",
    "own_of",
    "own_weights",
    "with_dots",
    "with_own",
]

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
    # braces would be free indices
    stems = Counter({stem: n for stem, n in stems.items() if "{" not in stem})
    claimed = {f.name: _claimed(stems, f) for f in known}
    best = max(known, key=lambda f: (claimed[f.name], "" not in _parts(f)), default=None)
    if best is None or not claimed[best.name]:
        return None
    return _family(stems, best), best, claimed[best.name]


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
    # names without a prefix may be of either kin: nothing tells, and the user says which
    kin = format.kin == source.kin or "module" in (format.kin, source.kin)
    return kin and "" not in (format.kin, source.kin) and source.joiner in (".", format.joiner)


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
            if module and param in (WEIGHT, BIAS) and "{" not in module:
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


# modules that a known family's table does not name ------------------------------------------

SAMPLE = 48  # modules that tell a file's naming


class Own(NamedTuple):
    """A module that its family's table does not name, with its name in a file.

    `naming` is that of the modules around it. `joined`: the file joins its words by underscores, so
    that its dots are not known.
    """

    component: str
    module: str
    naming: str
    joined: bool = False
    kind: Kind = Kind.MATRIX
    kernel: tuple[int, ...] = ()


def own_modules(keys: KeyMap, infos: Mapping[str, TensorInfo]) -> Iterator[Own]:
    """The modules of an adapter file that are spelled as adapters are, but in no table."""
    found: dict[str, dict[str, bool]] = {}  # component → module → whether all it has are vectors
    gates = {name.removesuffix("on_input") for name in infos if name.endswith(".on_input")}
    for key, _, part, module in _placed(keys, infos, claimed=False):
        if "{" not in module and spelled_as_adapter(key, gates):
            held = found.setdefault(part.name, {})
            held[module] = held.get(module, True) and len(infos[key].shape) < 2
    if not found:
        return
    known: dict[str, dict[str, None]] = {}
    for _, stem, part, _ in _placed(keys, infos, claimed=True):
        known.setdefault(part.name, {})[stem] = None
    for component, modules in found.items():
        naming = _naming(keys, component, known.get(component, ()))
        for module, vector in modules.items():
            kind = Kind.NORM if vector else Kind.MATRIX
            yield Own(component, module, naming, keys.format.joiner == "_", kind)


def _placed(
    keys: KeyMap, infos: Iterable[str], *, claimed: bool
) -> Iterator[tuple[str, str, Component, str]]:
    """The keys that a table claims, or does not: with their stem, component and module."""
    for key in infos:
        split = split_suffix(key)
        if split is not None and keys.claims(split[0]) is claimed and keys.roles(split[2]):
            place = keys.place(split[0])
            if place is not None and place[1]:
                yield key, split[0], *place


def _naming(keys: KeyMap, component: str, stems: Iterable[str]) -> str:
    """The naming that fits most of a component's modules in a file, or else the format's."""
    style, part = keys.format.style, keys.family.component(component)
    written = style if keys.format.private else part.naming(style)
    fits: Counter[str] = Counter()
    for stem in islice(stems, SAMPLE):
        slot, place = keys.slot(stem), keys.place(stem)
        row = None if slot is None else keys.row(slot.target)
        if slot is not None and place is not None and row is not None:
            fits.update(naming for naming in row.names if _spells(keys, slot, naming, place[1]))
    most = max(fits.values(), default=0)
    if fits[written] == most:
        return written
    return next(naming for naming, n in fits.items() if n == most)


def _spells(keys: KeyMap, slot: Slot, naming: str, module: str) -> bool:
    try:
        return keys.module(slot, naming) == module
    except NotRepresentable:  # this naming splits the module differently
        return False


def own_weights(keys: CheckpointMap, infos: Mapping[str, TensorInfo]) -> Iterator[Own]:
    """The layers of a checkpoint that its family's table does not name.

    Only beside known ones, that is, after a prefix that these have.
    """
    held: dict[str, Counter[tuple[str, str]]] = {}
    strange: list[TensorInfo] = []
    for name, info in infos.items():
        found = keys.found(name)
        if found is not None:
            prefix, place = found
            held.setdefault(prefix, Counter())[place.slot.component, place.naming] += 1
        elif name.endswith((f".{WEIGHT}", f".{BIAS}")) and keys.other(name) is None:
            strange.append(info)
    starts = sorted(held, key=len, reverse=True)
    shapes = {info.name: info.shape for info in strange}
    for info in strange:
        start = next((p for p in starts if info.name.startswith(p)), None)
        module, _, param = info.name[len(start or "") :].rpartition(".")
        float_ = info.dtype in (*FLOATS, *FP8, *BLOCKED)
        if start is None or not module or not float_ or "{" in module or not info.shape:
            continue
        if param == BIAS and f"{start}{module}.{WEIGHT}" in shapes:
            continue  # its weight tells more
        component, naming = held[start].most_common(1)[0][0]
        made = _row(module, info.shape if param == WEIGHT else (1, 1))
        yield Own(component, module, naming, kind=made.kind, kernel=made.kernel)


def with_own(family: ModelFamily, found: Iterable[Own]) -> ModelFamily:
    """A family with rows for modules that its table does not name."""
    rows: dict[str, dict[str, Row]] = {}
    for one in found:
        if find_row(family, one.component, one.module) is not None:
            continue  # another module has this target
        held = rows.setdefault(one.component, {})
        name = named(one.module)._replace(joiners="_" if one.joined else "._")
        before = held[one.module].names if one.module in held else {}
        names = MappingProxyType({**before, one.naming: (name,)})
        held[one.module] = Row(one.module, names, one.kind, one.kernel, own=True)
    return _grown(family, {part: tuple(held.values()) for part, held in rows.items()})


def _grown(family: ModelFamily, rows: Mapping[str, tuple[Row, ...]]) -> ModelFamily:
    """A family with more rows; itself if there are none."""
    if not rows:
        return family
    parts = tuple(
        replace(part, rows=(*part.rows, *_told_apart(part, rows[part.name])))
        if part.name in rows
        else part
        for part in family.components
    )
    return replace(family, components=parts)


def _told_apart(part: Component, rows: tuple[Row, ...]) -> Iterator[Row]:
    """Rows of which no two can be spelled alike: `a.b_c` and `a_b.c` are so with underscores."""
    taken = Counter(row.target.replace(".", "_") for row in rows)
    known = module_names(part, "_")
    for row in rows:
        flat = row.target.replace(".", "_")
        if taken[flat] == 1 and known.match(flat) is None:
            yield row
        else:
            names = {
                naming: tuple(name._replace(joiners=".") for name in names if "." in name.joiners)
                for naming, names in row.names.items()
            }
            yield row._replace(names=MappingProxyType(names))


def own_of(family: ModelFamily) -> Iterator[Own]:
    """The modules that `with_own` gave to a family, in each naming."""
    for part in family.components:
        for row in part.rows if part.rows and part.rows[-1].own else ():
            for naming, names in row.names.items() if row.own else ():
                for name in names:
                    joined = name.joiners == "_"
                    yield Own(part.name, row.target, naming, joined, row.kind, row.kernel)


def joint(made: Sequence[ModelFamily]) -> ModelFamily:
    """One family with the modules of all: of one table, or all made of names of one format."""
    first, *others = made
    table = families().get(first.name)
    if table is not None:
        return with_own(table, (own for family in made for own in own_of(family)))
    parts = {part.name: part for part in first.components}
    for part in (part for family in others for part in family.components):
        have = parts.setdefault(part.name, part)
        known = {row.target for row in have.rows}
        more = tuple(row for row in part.rows if row.target not in known)
        parts[part.name] = replace(have, rows=(*have.rows, *more)) if more else have
    return replace(first, components=tuple(parts.values()))


def with_dots(family: ModelFamily, other: ModelFamily) -> tuple[ModelFamily, dict[str, str]]:
    """A family whose own modules have the dots that another file of the same table has.

    Also the new name of each module that is renamed, by `component.old name`.
    """
    theirs = {
        (own.component, own.module.replace(".", "_")): own.module
        for own in own_of(other)
        if not own.joined
    }
    renamed: dict[str, str] = {}
    found: list[Own] = []
    for own in own_of(family):
        module = theirs.get((own.component, own.module)) if own.joined else None
        if module is not None:
            renamed[f"{own.component}.{own.module}"] = module
        found.append(own if module is None else own._replace(module=module, joined=False))
    return (with_own(families()[family.name], found) if renamed else family), renamed
