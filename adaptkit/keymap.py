"""From keys to slots and back, compiled from the tables: `compile_keys(family, format)`, `compile_checkpoint(family)`.

Parsing is one dictionary look-up per key. Names are never un-mangled: every spelling a table can produce is generated,
so that `to_out_0` or `context_block` cannot be misread.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from adaptkit.errors import NotRepresentable
from adaptkit.names import BIAS, WEIGHT, Rows, Slot, Target, tokenise
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adaptkit.algorithms.contract import Weights
    from adaptkit.families.contract import Component, Kind, ModelFamily, Name, Row
    from adaptkit.formats.contract import KeyFormat

__all__ = [
    "CheckpointMap",
    "KeyMap",
    "Parsed",
    "Place",
    "Templates",
    "algorithms",
    "compile_checkpoint",
    "compile_keys",
    "label",
    "param_of",
    "prefixes",
    "split_suffix",
]

OWN = "own"  # the template field of a format's own tags
P = TypeVar("P")
_FIELD = re.compile(r"\{(\w+)(?::(\d+))?\}")
_DOTS = re.compile(r"\.")
_PEFT = (
    "lora_",
    "hada_",
    "lokr_",
    "oft_",
    "boft_",
    "ia3_",
)  # what PEFT writes an adapter's name behind

RoleName = tuple[str, str]  # (algorithm, role)
_Match = tuple[
    "_Reading", dict[str, int], str
]  # what a stem means, its indices, its module as spelled


@cache
def algorithms() -> Mapping[str, type[Weights]]:
    """Every algorithm by name; one that wraps others appears once around each of them (`lora+dora`)."""
    kinds: Mapping[str, type[Weights]] = discover("adaptkit.algorithms", "ALGORITHM")
    found = {name: kind for name, kind in kinds.items() if not kind.wraps}
    for kind in kinds.values():
        composed = [kind.over(kinds[inner]) for inner in kind.wraps]
        found |= {one.name: one for one in composed}
    return MappingProxyType(found)


class Templates(Generic[P]):
    """Strings with free indices, `layers.{i:12}.fc{n}`, matched by one dictionary look-up on their skeleton."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[tuple[int, ...], dict[tuple[int, ...], _Entry[P]]]] = {}

    def add(self, template: str, payload: P, joiner: str = ".") -> None:
        """Register a template, its words joined by `joiner`; TypeError where another payload has the same one."""
        skeleton, positions, values, free = _compiled(template)
        if joiner != ".":
            skeleton = skeleton.replace(".", joiner)
        table = self._tables.setdefault(skeleton, {}).setdefault(positions, {})
        entry = table.setdefault(
            values, _Entry(payload, free)
        )  # the first reading of a name that two namings share
        if entry.payload is not payload and entry.payload != payload:
            raise TypeError(f"{template!r} means both {entry.payload} and {payload}")

    def match(self, text: str) -> tuple[P, dict[str, int]] | None:
        """The payload whose template gives this string, and the values of its free indices."""
        skeleton, numbers = tokenise(text)
        for positions, table in self._tables.get(skeleton, {}).items():
            entry = table.get(tuple(numbers[p] for p in positions))
            if entry is not None and (indices := entry.indices(numbers)) is not None:
                return entry.payload, indices
        return None


_Free = tuple[tuple[int, str, int | None], ...]  # (position, index name, bound)


class _Entry(NamedTuple, Generic[P]):
    payload: P
    free: _Free

    def indices(self, numbers: tuple[int, ...]) -> dict[str, int] | None:
        found: dict[str, int] = {}
        for position, name, bound in self.free:
            value = numbers[position]
            if (bound is not None and value >= bound) or found.setdefault(name, value) != value:
                return None
        return found


@cache
def _compiled(template: str) -> tuple[str, tuple[int, ...], tuple[int, ...], _Free]:
    """Skeleton, the places and values of the fixed integers, and the free ones; families share most of their templates."""
    if "{" not in template:
        skeleton, values = tokenise(template)
        return skeleton, tuple(range(len(values))), values, ()
    skeleton, last = "", 0
    positions: list[int] = []
    fixed: list[int] = []
    free: list[tuple[int, str, int | None]] = []
    for index in (*_FIELD.finditer(template), None):
        shape, numbers = tokenise(template[last : index and index.start()])
        first = len(fixed) + len(free)
        positions.extend(range(first, first + len(numbers)))
        fixed.extend(numbers)
        skeleton += shape
        if index is not None:
            free.append((len(fixed) + len(free), index[1], int(index[2]) if index[2] else None))
            skeleton, last = skeleton + "#", index.end()
    return skeleton, tuple(positions), tuple(fixed), tuple(free)


def _fill(template: str, indices: Mapping[str, int]) -> str:
    if not indices:
        return template
    return _FIELD.sub(lambda found: str(indices[found[1]]), template)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one template means: a target of a component, or a cut of its rows, perhaps with its halves exchanged."""

    component: str
    target: str
    rows: Rows | None
    swapped: bool
    naming: str = field(compare=False)  # where two namings spell a module alike, they mean the same

    def slot(self, indices: Mapping[str, int], param: str) -> Slot:
        return Slot(Target(self.component, _fill(self.target, indices), param), self.rows)


class Parsed(NamedTuple):
    """What an adapter key says: the slot, and what the tensor may be to which algorithm.

    `module` is the module's name as the file has it, without the format's prefix; `naming` the naming it belongs to;
    `swapped` whether that naming holds the target's rows with their halves exchanged.
    """

    slot: Slot
    spelled: str
    roles: tuple[RoleName, ...]
    module: str
    naming: str
    swapped: bool


class KeyMap:
    """All adapter keys of one family in one format, both directions."""

    def __init__(self, family: ModelFamily, format: KeyFormat) -> None:
        self.family = family
        self.format = format
        found = [(prefix, part) for part in family.components for prefix in prefixes(part, format)]
        self._parts = sorted(
            found, key=lambda item: -len(item[0])
        )  # `lora_unet__` before `lora_unet_`
        self._own = format.style if format.private else ""
        self._prefixes = _written_prefixes(family, format)
        # a stem comes once per role, a slot in every step
        self._found: dict[str, _Match | None] = {}
        self._slots: dict[str, Slot] = {}
        self._held: dict[tuple[RoleName, ...], tuple[RoleName, ...]] = {}
        self._suffix: dict[RoleName, str] = {}
        self._spelled: dict[Slot, str] = {}

    def parse(self, key: str) -> Parsed | None:
        """The slot and roles of a key, or None where this family and format do not know it."""
        found = split_suffix(key)
        if found is None:
            return None
        stem, spelled, roles = found
        roles = self.roles(roles)
        match = self._match(stem) if roles else None
        if match is None:
            return None
        reading, _, module = match
        slot = self._slot(stem, match, param_of(roles[0]))
        return Parsed(slot, spelled, roles, module, reading.naming, reading.swapped)

    def roles(self, roles: tuple[RoleName, ...]) -> tuple[RoleName, ...]:
        """Those of a suffix's roles that this format spells."""
        if roles not in self._held:
            self._held[roles] = tuple(role for role in roles if self.holds(role[0]))
        return self._held[roles]

    def holds(self, algorithm: str) -> bool:
        """Whether this format spells this algorithm at all."""
        return algorithm in self.format.owns if self.format.owns else algorithm not in _owned()

    def slot(self, stem: str, param: str = WEIGHT) -> Slot | None:
        """The slot a key's stem (the key without its suffix) names, or None."""
        match = self._match(stem)
        return None if match is None else self._slot(stem, match, param)

    def claims(self, stem: str) -> bool:
        """Whether a key's stem names a slot."""
        return self._match(stem) is not None

    def _slot(self, stem: str, match: _Match, param: str) -> Slot:
        if param != WEIGHT:
            return match[0].slot(match[1], param)
        if stem not in self._slots:
            self._slots[stem] = match[0].slot(match[1], WEIGHT)
        return self._slots[stem]

    def _match(self, stem: str) -> _Match | None:
        if stem not in self._found:
            self._found[stem] = self._matched(stem)
        return self._found[stem]

    def _matched(self, stem: str) -> _Match | None:
        for prefix, part in self._parts:
            if stem.startswith(prefix):  # so that no part is compiled that the file does not have
                module = stem[len(prefix) :]
                if (match := _stems(part, self.format.joiner, self._own).match(module)) is not None:
                    return *match, module
        return None

    def row(self, target: Target) -> Row | None:
        """The table row that a target comes from."""
        found = _row(self.family, target.component, target.module)
        return found[0] if found else None

    def ends(self, target: Target) -> Iterator[str]:
        """The runs of blocks (`double_blocks.{i:19}`) that a target stands in the last one of."""
        found = _row(self.family, target.component, target.module)
        for free in _FIELD.finditer(found[0].target) if found else ():
            if found and found[1][free.group(1)] + 1 == int(free.group(2)) > 1:
                yield found[0].target[: free.end()]

    def spell(self, slot: Slot, algorithm: str, role: str) -> str:
        """The key that holds this role of this slot; NotRepresentable where the format has no place for it."""
        suffix = self._suffix.get((algorithm, role))
        if suffix is None:
            if not self.holds(algorithm):
                raise NotRepresentable(
                    f"the {self.format.name} format has no names for {algorithm}"
                )
            suffix = (
                self.format.spelling.get(algorithm, {}).get(role)
                or algorithms()[algorithm].roles[role].spelling
            )
            self._suffix[algorithm, role] = suffix
        return f"{self.stem(slot)}.{suffix}"

    def stem(self, slot: Slot) -> str:
        """The key of a slot without its suffix."""
        key = slot if slot.param == WEIGHT else Slot(slot.target._replace(param=WEIGHT), slot.rows)
        if key not in self._spelled:
            self._spelled[key] = self._prefixes.get(slot.component, "") + self.module(key)
        return self._spelled[key]

    def module(self, slot: Slot, naming: str | None = None) -> str:
        """The name of a slot's module as this format writes it, or in a given naming, without the prefix."""
        part = self.family.component(slot.component)
        if naming is None and not self.writes(part):
            raise NotRepresentable(
                f"the {self.format.name} format has no place for the {part.title} of {self.family.title}"
            )
        found = _row(self.family, part.name, slot.target.module)
        if found is None:
            raise NotRepresentable(f"{slot} is no module of {self.family.title}")
        names = self._written(part, found[0]) if naming is None else found[0].names.get(naming, ())
        name = next((n for n in names if n.rows == slot.rows), None)
        if name is None:
            raise NotRepresentable(
                f"the {self.format.name} format has no name for {label(self.family, slot)}"
            )
        return _fill(_joined(name.module, self.format.joiner), found[1])

    def swapped(self, slot: Slot) -> bool:
        """Whether this format writes a slot's rows with their halves exchanged."""
        row = self.row(slot.target)
        names = () if row is None else self._written(self.family.component(slot.component), row)
        return any(name.swapped for name in names if name.rows == slot.rows)

    def _written(self, part: Component, row: Row) -> tuple[Name, ...]:
        if self.format.private:
            return row.names.get(self.format.style, ())
        naming = part.naming(self.format.style)
        return row.names[naming] if naming in row.names else row.names["diffusers"]

    def writes(self, part: Component) -> bool:
        """Whether this component can be written; where names carry no component, only the first one that shares a prefix."""
        return part.name in self._prefixes

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """The slots this format cuts a target into: itself, or its parts in order; none where it has no place for it."""
        part = self.family.component(target.component)
        row = self.row(target)
        if row is None or not self.writes(part):
            return ()
        return tuple(Slot(target, name.rows) for name in self._written(part, row))


@cache
def _stems(part: Component, joiner: str, own: str) -> Templates[_Reading]:
    """Every name of a component's modules, words joined by `joiner`; shared by the formats that join alike.

    `own` is the naming of a format that reads no other; without it, all namings that no format keeps to itself.
    """
    stems: Templates[_Reading] = Templates()
    for row in part.rows:
        for naming, names in row.names.items():
            if naming == own or (not own and naming not in _private()):
                for name in (name for name in names if not name.transposed):
                    reading = _Reading(part.name, row.target, name.rows, name.swapped, naming)
                    stems.add(name.module, reading, joiner)
    return stems


@cache
def _private() -> frozenset[str]:
    """The namings that a format keeps to itself."""
    return frozenset(f.style for f in discover("adaptkit.formats", "FORMAT").values() if f.private)


@cache
def _owned() -> frozenset[str]:
    """The algorithms that only one format spells."""
    return frozenset(
        name for f in discover("adaptkit.formats", "FORMAT").values() for name in f.owns
    )


@cache
def _rows(family: ModelFamily) -> Mapping[str, Templates[Row]]:
    """The rows of each component, by target name."""
    found: dict[str, Templates[Row]] = {part.name: Templates() for part in family.components}
    for part in family.components:
        for row in part.rows:
            found[part.name].add(row.target, row)
    return found


_NO_ROWS: Templates[Row] = Templates()


@lru_cache(maxsize=65536)
def _row(family: ModelFamily, component: str, module: str) -> tuple[Row, dict[str, int]] | None:
    """The row that a module of a component comes from, and its indices; every format asks for the same."""
    return _rows(family).get(component, _NO_ROWS).match(module)


def _written_prefixes(family: ModelFamily, format: KeyFormat) -> dict[str, str]:
    """The prefix that each component is written with; the first component where two have the same."""
    found: dict[str, str] = {}
    for part in family.components:
        mine = prefixes(part, format)[:1]
        if mine and mine[0] not in found.values():
            found[part.name] = mine[0]
    return found


def prefixes(part: Component, format: KeyFormat) -> tuple[str, ...]:
    """Every prefix of this component in this format, the written one first; none where a tag is missing."""
    found: list[str] = []
    for template in format.prefixes:
        tag = template.partition("{")[2].partition("}")[0]
        values = format.tags.get(part.name, ()) if tag == OWN else part.tags.get(tag, ())
        found.extend(template.replace(f"{{{tag}}}", value) for value in values)
    return tuple(found)


def _joined(module: str, joiner: str) -> str:
    return module if joiner == "." else module.replace(".", joiner)


def param_of(role: RoleName) -> str:
    """The parameter (`weight`, `bias`) that a role adapts."""
    algorithm, name = role
    return algorithms()[algorithm].roles[name].param


@cache
def _suffixes() -> Mapping[str, tuple[RoleName, ...]]:
    """Every key suffix that any algorithm or format spells, and the roles it may be."""
    found: dict[str, list[RoleName]] = {}
    overrides = [format.spelling for format in discover("adaptkit.formats", "FORMAT").values()]
    for algorithm, kind in algorithms().items():
        for name, role in kind.roles.items():
            spelled = [spelling.get(algorithm, {}).get(name) for spelling in overrides]
            for suffix in dict.fromkeys((role.spelling, *role.also, *filter(None, spelled))):
                found.setdefault(suffix, []).append((algorithm, name))
    return {suffix: tuple(roles) for suffix, roles in found.items()}


@lru_cache(maxsize=65536)
def split_suffix(key: str) -> tuple[str, str, tuple[RoleName, ...]] | None:
    """(stem, suffix, roles) of a key by the longest suffix that any algorithm knows; None where there is none."""
    known = _suffixes()
    for dot in _DOTS.finditer(key):
        suffix = key[dot.end() :]
        if suffix in known:
            return key[: dot.start()], suffix, known[suffix]
        plain = _unnamed(suffix)
        if plain in known:
            return key[: dot.start()], plain, known[plain]
    return None


def _unnamed(suffix: str) -> str:
    """A suffix without the adapter's name that PEFT writes into it: `lora_A.default.weight` → `lora_A.weight`."""
    first, *rest = suffix.split(".")
    if not first.startswith(_PEFT) or not rest or rest[0] in (WEIGHT, BIAS) or len(rest) > 2:
        return ""
    return ".".join((first, *rest[1:]))


@cache
def compile_keys(family_name: str, format_name: str) -> KeyMap:
    """The key map of a family in a format, by their names (cached)."""
    return KeyMap(
        discover("adaptkit.families", "FAMILY")[family_name],
        discover("adaptkit.formats", "FORMAT")[format_name],
    )


@dataclass(frozen=True, slots=True)
class Place:
    """What a checkpoint key holds: a slot, in which naming, perhaps transposed or with the halves of its rows exchanged."""

    slot: Slot
    kind: Kind
    naming: str
    transposed: bool = False
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Spelled:
    """A tensor as a layout stores it: its key without the prefix, what it holds, the kernel it is stored with.

    None: a vector's, or whatever the tensor has.
    """

    key: str
    place: Place
    kernel: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Parameter:
    reading: _Reading
    param: str
    kind: Kind
    transposed: bool


class CheckpointMap:
    """All checkpoint keys of one family, in every layout it knows."""

    def __init__(self, family: ModelFamily, *, beside: bool = False) -> None:
        """`beside`: the parts that no adapter holds as well."""
        self.family = (
            replace(family, components=(*family.components, *family.beside)) if beside else family
        )
        family = self.family
        found: dict[str, Templates[_Parameter]] = {}
        shared: dict[tuple[str, str], Templates[_Parameter]] = {}
        tables = [
            (prefix, part, naming)
            for part in family.components
            for naming, p in part.checkpoints.items()
            for prefix in p
        ]
        alone = {
            prefix for prefix, n in Counter(prefix for prefix, _, _ in tables).items() if n == 1
        }
        for prefix, part, naming in tables:
            if prefix in alone:
                if (part.name, naming) not in shared:
                    shared[part.name, naming] = _parameters(Templates(), part, naming)
                found[prefix] = shared[part.name, naming]
            else:
                _parameters(found.setdefault(prefix, Templates()), part, naming)
        self._keys = sorted(found.items(), key=lambda item: -len(item[0]))

    def parse(self, key: str) -> Place | None:
        """What a checkpoint key holds, or None where the family does not know it."""
        for prefix, keys in self._keys:
            if key.startswith(prefix) and (match := keys.match(key[len(prefix) :])) is not None:
                found, indices = match
                reading = found.reading
                slot = reading.slot(indices, found.param)
                return Place(slot, found.kind, reading.naming, found.transposed, reading.swapped)
        return None

    def claims(self, key: str) -> bool:
        """Whether `parse` knows a checkpoint key."""
        starts = ((prefix, keys) for prefix, keys in self._keys if key.startswith(prefix))
        return any(keys.match(key[len(prefix) :]) is not None for prefix, keys in starts)

    def spelled(self, target: Target, naming: str) -> tuple[Spelled, ...]:
        """The tensors that a naming keeps a target in (weights or biases), in the order of its rows; none without names."""
        found = _row(self.family, target.component, target.module)
        if found is None:
            return ()
        row, indices = found
        bias = target.param == BIAS
        names = row.names.get(naming) or row.names["diffusers"]
        return tuple(
            Spelled(
                _fill(name.bias if bias else name.weight, indices),
                Place(
                    Slot(target, name.rows),
                    row.kind,
                    naming,
                    name.transposed and not bias,
                    name.swapped,
                ),
                None if bias else row.kernel if name.kernel is None else name.kernel,
            )
            for name in names
        )

    def other(self, key: str) -> str | None:
        """The part of a checkpoint that no adapter holds which this key belongs to (`vae`, `ema`), if any."""
        return next(
            (part for part, prefixes in self.family.others.items() if key.startswith(prefixes)),
            None,
        )


def _parameters(keys: Templates[_Parameter], part: Component, naming: str) -> Templates[_Parameter]:
    """Add the weights and biases of a component in one naming."""
    for row in part.rows:
        for name in row.names.get(naming) or row.names["diffusers"]:
            reading = _Reading(part.name, row.target, name.rows, name.swapped, naming)
            keys.add(name.weight, _Parameter(reading, WEIGHT, row.kind, name.transposed))
            keys.add(name.bias, _Parameter(reading, BIAS, row.kind, False))
    return keys


@cache
def compile_checkpoint(family_name: str) -> CheckpointMap:
    """The checkpoint map of a family, by its name (cached)."""
    return CheckpointMap(discover("adaptkit.families", "FAMILY")[family_name])


def label(family: ModelFamily, slot: Slot, naming: str = "diffusers") -> str:
    """What people call a slot: its component and its name in `naming`, `text_encoder_2.….self_attn.q_proj`."""
    found = _row(family, slot.component, slot.target.module)
    if found is not None:
        row, indices = found
        for names in (row.names.get(naming, ()), row.names.get("diffusers", ())):
            name = next((n for n in names if n.rows == slot.rows), None)
            if name is not None:
                return str(Target(slot.component, _fill(name.module, indices), slot.param))
    return str(slot)
