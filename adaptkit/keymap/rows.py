"""Look up a family's table rows by target."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from adaptkit.keymap.templates import Templates, fill
from adaptkit.names import Rows, Slot, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.families.contract import ModelFamily, Row

__all__ = ["Reading", "find_row", "label"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The meaning of a template: a target or a row range of it."""

    component: str
    target: str
    rows: Rows | None
    swapped: bool
    # not compared: two namings that spell a module alike mean the same module
    naming: str = field(compare=False)

    def slot(self, indices: Mapping[str, int], param: str) -> Slot:
        """The slot for given indices."""
        return Slot(Target(self.component, fill(self.target, indices), param), self.rows)


# bounded, because files bring tables of their own (see adaptkit.unknown)
@lru_cache(maxsize=96)
def _rows(family: ModelFamily) -> Mapping[str, Templates[Row]]:
    """The rows of each component, by target name."""
    found: dict[str, Templates[Row]] = {part.name: Templates() for part in family.components}
    for part in family.components:
        for row in part.rows:
            found[part.name].add(row.target, row)
    return found


_NO_ROWS: Templates[Row] = Templates()


@lru_cache(maxsize=65536)
def find_row(family: ModelFamily, component: str, module: str) -> tuple[Row, dict[str, int]] | None:
    """The table row and block indices of a module.

    Cached, because every format asks for it.
    """
    return _rows(family).get(component, _NO_ROWS).match(module)


# a report names a module as often as it has lists of them
@lru_cache(maxsize=16384)
def label(family: ModelFamily, slot: Slot, naming: str = "diffusers") -> str:
    """The display name of a slot in `naming`, such as `text_encoder_2.….self_attn.q_proj`."""
    found = find_row(family, slot.component, slot.target.module)
    if found is not None:
        row, indices = found
        for names in (row.names.get(naming, ()), row.names.get("diffusers", ())):
            name = next((n for n in names if n.rows == slot.rows), None)
            if name is not None:
                return str(Target(slot.component, fill(name.module, indices), slot.param))
    return str(slot)
