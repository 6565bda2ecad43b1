"""Checkpoint keys of a family, parsed and spelled in every layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from adaptkit.keymap.rows import Reading, find_row
from adaptkit.keymap.templates import Templates, fill
from adaptkit.names import BIAS, WEIGHT, Slot, Target
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptkit.families.contract import Component, Kind, ModelFamily, Name, Row

__all__ = ["CheckpointMap", "Place", "compile_checkpoint"]


@dataclass(frozen=True, slots=True)
class Place:
    """The content of a checkpoint key: a slot in a naming.

    `transposed`: the transpose of the slot is stored. `swapped`: its halves of rows are swapped.
    """

    slot: Slot
    kind: Kind
    naming: str
    transposed: bool = False
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Spelled:
    """A tensor in a layout: its key, its content and its kernel.

    The key has no prefix.

    `kernel` is None for vectors, and for a target stored with the kernel its tensor has.
    """

    key: str
    place: Place
    kernel: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Parameter:
    reading: Reading
    param: str
    kind: Kind
    transposed: bool


class CheckpointMap:
    """All checkpoint keys of one family, in every known layout."""

    def __init__(self, family: ModelFamily, *, beside: bool = False) -> None:
        """With `beside`, also the components that no adapter holds (such as the VAE)."""
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
        # prefixes of one component and naming share a table; an ambiguous prefix needs a joint one
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
        # longest prefix first: the empty prefix of bare state dicts matches every key
        self._keys = sorted(found.items(), key=lambda item: -len(item[0]))

    def parse(self, key: str) -> Place | None:
        """Parse a checkpoint key; None if the family does not know it."""
        found = self.found(key)
        return None if found is None else found[1]

    def found(self, key: str) -> tuple[str, Place] | None:
        """The prefix of a checkpoint key and what it holds; None if the family does not know it."""
        for prefix, keys in self._keys:
            if key.startswith(prefix) and (match := keys.match(key[len(prefix) :])) is not None:
                found, indices = match
                reading = found.reading
                slot = reading.slot(indices, found.param)
                return prefix, Place(
                    slot, found.kind, reading.naming, found.transposed, reading.swapped
                )
        return None

    def claims(self, key: str) -> bool:
        """Whether `parse` knows a checkpoint key."""
        return self.reading(key) is not None

    def reading(self, key: str) -> Reading | None:
        """The reading of a checkpoint key, the same for a module in every block."""
        for prefix, keys in self._keys:
            if key.startswith(prefix) and (match := keys.match(key[len(prefix) :])) is not None:
                return match[0].reading
        return None

    def spelled(self, target: Target, naming: str) -> tuple[Spelled, ...]:
        """The tensors of a target in a naming, in row order."""
        found = find_row(self.family, target.component, target.module)
        if found is None:
            return ()
        row, indices = found
        bias = target.param == BIAS
        names = _names(row, naming)
        return tuple(
            Spelled(
                fill(name.bias if bias else name.weight, indices),
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
        """The non-adaptable part that a key belongs to (`vae`, `ema`), if any."""
        return next(
            (part for part, prefixes in self.family.others.items() if key.startswith(prefixes)),
            None,
        )


def _names(row: Row, naming: str) -> Iterator[Name]:
    """The names of a row in a naming of checkpoints, whose dots must be known."""
    names = row.names.get(naming) or (() if row.own else row.names["diffusers"])
    return (name for name in names if "." in name.joiners)


def _parameters(keys: Templates[_Parameter], part: Component, naming: str) -> Templates[_Parameter]:
    """Add the weights and biases of a component in one naming to `keys`."""
    for row in part.rows:
        for name in _names(row, naming):
            reading = Reading(part.name, row.target, name.rows, name.swapped, naming)
            keys.add(name.weight, _Parameter(reading, WEIGHT, row.kind, name.transposed))
            # a bias has no transpose, whatever its weight has
            keys.add(name.bias, _Parameter(reading, BIAS, row.kind, False))
    return keys


@cache
def compile_checkpoint(family_name: str) -> CheckpointMap:
    """The checkpoint map of a family, by name (cached)."""
    return CheckpointMap(discover("adaptkit.families", "FAMILY")[family_name])
