"""Adapter keys of a family in a format, parsed and spelled."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import NotRepresentable
from adaptkit.families.contract import Kind
from adaptkit.keymap.roles import RoleName, algorithms, param_of, split_suffix
from adaptkit.keymap.rows import Reading, find_row, label
from adaptkit.keymap.templates import FIELD, Templates, fill
from adaptkit.keymap.wrappers import unwrapped
from adaptkit.names import BIAS, WEIGHT, Slot, Target
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptkit.families.contract import Component, ModelFamily, Name, Row
    from adaptkit.formats.contract import KeyFormat

__all__ = ["Dialect", "KeyMap", "Parsed", "compile_keys", "keys_for", "module_names", "prefixes"]

OWN = "own"  # the template field of a format's own tags

# (meaning of a stem, its indices, its module as spelled)
_Match = tuple["Reading", dict[str, int], str]


class Parsed(NamedTuple):
    """A parsed adapter key: its slot, and its possible roles by algorithm.

    `module` is the module's name in the file without the format's prefix, `naming` the naming it
    belongs to. `swapped`: that naming stores the target's rows with their halves swapped.
    """

    slot: Slot
    spelled: str
    roles: tuple[RoleName, ...]
    module: str
    naming: str
    swapped: bool


class Dialect(NamedTuple):
    """How one reader of a format wants it written.

    `prefixes` are written for a component that has one of them, instead of its first. The windows
    of tensors of the suffixes in `flat` are flattened, unless they have two dimensions.
    """

    prefixes: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()


class KeyMap:
    """All adapter keys of one family in one format, in both directions.

    `wrapped`: names are read behind the prefixes of wrappers too, see adaptkit.keymap.wrappers.
    """

    def __init__(
        self,
        family: ModelFamily,
        format: KeyFormat,
        dialect: Dialect | None = None,
        *,
        wrapped: bool = False,
    ) -> None:
        self.family = family
        self.format = format
        self.dialect = dialect or Dialect()
        self.wrapped = wrapped
        found = [(prefix, part) for part in family.components for prefix in prefixes(part, format)]
        # longest prefix first: `lora_unet__` before `lora_unet_`
        self._parts = sorted(found, key=lambda item: -len(item[0]))
        self._own = format.style if format.private else ""
        self._prefixes = _written_prefixes(family, format, self.dialect.prefixes)
        # caches: a stem is looked up once per role, a slot in every step
        self._found: dict[str, _Match | None] = {}
        self._slots: dict[str, Slot] = {}
        self._held: dict[tuple[RoleName, ...], tuple[RoleName, ...]] = {}
        self._suffix: dict[RoleName, str] = {}
        self._spelled: dict[Slot, str] = {}

    def parse(self, key: str) -> Parsed | None:
        """Parse a key; None if this family and format do not know it."""
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
        if spelled == WEIGHT:  # as models call it too
            roles = tuple(role for role in roles if self._plain(role, slot))
            if not roles:
                return None
        return Parsed(slot, spelled, roles, module, reading.naming, reading.swapped)

    def _plain(self, role: RoleName, slot: Slot) -> bool:
        """Whether a role is called `weight` here: by its algorithm, or by this format for norms."""
        algorithm, name = role
        if algorithms()[algorithm].roles[name].spelling == WEIGHT:
            return True
        return self._own_suffix(role) == WEIGHT and self.normed(slot.target)

    def _own_suffix(self, role: RoleName) -> str | None:
        """The suffix that this format has instead of the algorithm's, if any."""
        return self.format.spelling.get(role[0], {}).get(role[1])

    def roles(self, roles: tuple[RoleName, ...]) -> tuple[RoleName, ...]:
        """The roles of a suffix that this format spells."""
        if roles not in self._held:
            self._held[roles] = tuple(role for role in roles if self.holds(role[0]))
        return self._held[roles]

    def holds(self, algorithm: str) -> bool:
        """Whether this format spells an algorithm."""
        return algorithm in self.format.owns if self.format.owns else algorithm not in _owned()

    def slot(self, stem: str, param: str = WEIGHT) -> Slot | None:
        """The slot of a stem (a key without its suffix), or None."""
        match = self._match(stem)
        return None if match is None else self._slot(stem, match, param)

    def reading(self, stem: str) -> Reading | None:
        """The reading of a stem, the same for a module in every block."""
        match = self._match(stem)
        return None if match is None else match[0]

    def claims(self, stem: str) -> bool:
        """Whether a stem names a slot."""
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
        found = self._known(stem)
        if found is None and self.wrapped:
            return next(filter(None, map(self._known, unwrapped(stem))), None)
        return found

    def _known(self, stem: str) -> _Match | None:
        for prefix, part in self._parts:
            # checked first, so that only components in the file are compiled
            if stem.startswith(prefix):
                module = stem[len(prefix) :]
                if (
                    match := module_names(part, self.format.joiner, self._own).match(module)
                ) is not None:
                    return *match, module
        return None

    def place(self, stem: str) -> tuple[Component, str] | None:
        """The component that a stem's prefix means, and the rest of the stem."""
        stem = next(iter(unwrapped(stem)), stem) if self.wrapped else stem
        start = next(((p, part) for p, part in self._parts if stem.startswith(p)), None)
        return None if start is None else (start[1], stem[len(start[0]) :])

    def row(self, target: Target) -> Row | None:
        """The table row of a target."""
        found = find_row(self.family, target.component, target.module)
        return found[0] if found else None

    def edges(self, target: Target) -> Iterator[tuple[str, bool]]:
        """The runs of blocks (`double_blocks.{i:19}`) whose first or last block holds a target.

        With each comes whether it is the last block.
        """
        found = find_row(self.family, target.component, target.module)
        for free in FIELD.finditer(found[0].target) if found else ():
            index, bound = found[1][free.group(1)] if found else 0, int(free.group(2))
            # a bound of 1 is not a run: every file would hold its last block
            if bound > 1 and index in (0, bound - 1) and found:
                yield found[0].target[: free.end()], index > 0

    def spell(self, slot: Slot, algorithm: str, role: str) -> str:
        """The key of a role of a slot; `NotRepresentable` if there is none."""
        suffix = self._suffix.get((algorithm, role))
        if suffix is None:
            if not self.holds(algorithm):
                raise NotRepresentable(
                    f"the {self.format.name} format has no names for {algorithm}",
                    hint="--algo full --base CHECKPOINT writes what it changes",
                )
            plain = algorithms()[algorithm].roles[role].spelling
            suffix = self._own_suffix((algorithm, role)) or plain
            self._suffix[algorithm, role] = suffix
        if slot.param == BIAS or suffix == WEIGHT:
            # the format's is that of a LoRA's bias, or of a norm's weight
            own = self.normed(slot.target) is not (slot.param == BIAS)
            suffix = suffix if own else algorithms()[algorithm].roles[role].spelling
        return f"{self.stem(slot)}.{suffix}"

    def flat(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of this name, flattened if the reader wants it so."""
        if len(shape) in (2, 4) or not name.endswith(self.dialect.flat):
            return shape
        return (shape[0], math.prod(shape[1:]))

    def beside_lora(self, slot: Slot) -> bool:
        """Whether the format stores this bias as a part of its layer's LoRA, as PEFT does."""
        return self.format.peft and slot.param == BIAS and not self.normed(slot.target)

    def normed(self, target: Target) -> bool:
        """Whether a target is a norm, whose weight is a vector."""
        row = self.row(target)
        return row is not None and row.kind is Kind.NORM

    def stem(self, slot: Slot) -> str:
        """The key of a slot without its suffix."""
        key = slot if slot.param == WEIGHT else Slot(slot.target._replace(param=WEIGHT), slot.rows)
        if key not in self._spelled:
            self._spelled[key] = self._prefixes.get(slot.component, "") + self.module(key)
        return self._spelled[key]

    def module(self, slot: Slot, naming: str | None = None) -> str:
        """The module name of a slot without prefix, here or in a naming."""
        part = self.family.component(slot.component)
        if naming is None and not self.writes(part):
            raise NotRepresentable(
                f"the {self.format.name} format has no place for the {part.title} "
                f"of {self.family.title}"
            )
        found = find_row(self.family, part.name, slot.target.module)
        if found is None:
            raise NotRepresentable(f"{slot} is not a module of {self.family.title}")
        names = self._written(part, found[0]) if naming is None else found[0].names.get(naming, ())
        name = next((n for n in names if n.rows == slot.rows), None)
        if name is None:
            raise NotRepresentable(
                f"the {self.format.name} format has no name for {label(self.family, slot)}"
            )
        return fill(_joined(name.module, self.format.joiner), found[1])

    def filled(self, name: str, target: Target) -> str:
        """A name of a target's row, as this format joins it, with the target's indices."""
        found = find_row(self.family, target.component, target.module)
        return fill(_joined(name, self.format.joiner), found[1] if found else {})

    def swapped(self, slot: Slot) -> bool:
        """Whether this format stores a slot's rows with their halves swapped."""
        row = self.row(slot.target)
        names = () if row is None else self._written(self.family.component(slot.component), row)
        return any(name.swapped for name in names if name.rows == slot.rows)

    def _written(self, part: Component, row: Row) -> tuple[Name, ...]:
        naming = self.format.style if self.format.private else part.naming(self.format.style)
        # rows without a name of their own in a naming are spelled as in diffusers
        other = () if self.format.private or row.own else row.names["diffusers"]
        names = row.names.get(naming, other)
        if row.own:
            return tuple(name for name in names if self.format.joiner in name.joiners)
        return names

    def writes(self, part: Component) -> bool:
        """Whether a component can be written.

        If names carry no component, only the first component of a prefix can.
        """
        return part.name in self._prefixes

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """The slots of a target in this format, in row order.

        Empty if the format has no place for it.
        """
        part = self.family.component(target.component)
        row = self.row(target)
        if row is None or not self.writes(part):
            return ()
        return tuple(Slot(target, name.rows) for name in self._written(part, row))


# bounded, because files bring tables of their own (see adaptkit.unknown)
@lru_cache(maxsize=384)
def module_names(part: Component, joiner: str, own: str = "") -> Templates[Reading]:
    """All module names of a component, joined by `joiner` (cached).

    `own` is the only naming that a private format reads. Without it, all public namings are read.
    """
    stems: Templates[Reading] = Templates()
    private = _private()
    for row in part.rows:
        for naming, names in row.names.items():
            if (naming != own) if own else (naming in private):
                continue
            for name in names:
                if not name.transposed and joiner in name.joiners:
                    reading = Reading(part.name, row.target, name.rows, name.swapped, naming)
                    stems.add(name.module, reading, joiner)
    return stems


@cache
def _private() -> frozenset[str]:
    """The namings of private formats."""
    return frozenset(f.style for f in discover("adaptkit.formats", "FORMAT").values() if f.private)


@cache
def _owned() -> frozenset[str]:
    """The algorithms that only one format spells."""
    return frozenset(
        name for f in discover("adaptkit.formats", "FORMAT").values() for name in f.owns
    )


def _written_prefixes(
    family: ModelFamily, format: KeyFormat, wanted: tuple[str, ...]
) -> dict[str, str]:
    """The prefix to write each component with.

    Of two components with the same prefix, the first gets it, unless their names tell them apart.
    """
    found: dict[str, str] = {}
    for part in family.components:
        known = prefixes(part, format)
        mine = tuple(prefix for prefix in known if prefix in wanted)[:1] or known[:1]
        # two components with one prefix could not be told apart when read back
        if mine and (part.apart or mine[0] not in found.values()):
            found[part.name] = mine[0]
    return found


def prefixes(part: Component, format: KeyFormat) -> tuple[str, ...]:
    """Every prefix of a component in a format, the written one first.

    Empty if a tag is missing.
    """
    found: list[str] = []
    for template in format.prefixes:
        tag = template.partition("{")[2].partition("}")[0]
        values = format.tags.get(part.name, ()) if tag == OWN else part.tags.get(tag, ())
        found.extend(template.replace(f"{{{tag}}}", value) for value in values)
    return tuple(found)


def _joined(module: str, joiner: str) -> str:
    return module if joiner == "." else module.replace(".", joiner)


def keys_for(family: ModelFamily, format: KeyFormat, dialect: Dialect | None = None) -> KeyMap:
    """The key map of a family in a format; cached if the family is a table's."""
    if discover("adaptkit.families", "FAMILY").get(family.name) is family:
        return compile_keys(family.name, format.name, dialect)
    return KeyMap(family, format, dialect)


@cache
def compile_keys(
    family_name: str, format_name: str, dialect: Dialect | None = None, *, wrapped: bool = False
) -> KeyMap:
    """The key map of a family in a format, by name (cached)."""
    return KeyMap(
        discover("adaptkit.families", "FAMILY")[family_name],
        discover("adaptkit.formats", "FORMAT")[format_name],
        dialect,
        wrapped=wrapped,
    )
