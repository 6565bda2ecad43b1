"""The table rows of a family, by target."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from adaptkit.keymap.templates import Templates, fill
from adaptkit.names import Rows, Slot, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.families.contract import ModelFamily, Row

__all__ = ["Reading", "find_row", "label"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one template means: a target of a component, or a cut of its rows, perhaps with its halves exchanged."""

    component: str
    target: str
    rows: Rows | None
    swapped: bool
    naming: str = field(compare=False)  # where two namings spell a module alike, they mean the same

    def slot(self, indices: Mapping[str, int], param: str) -> Slot:
        return Slot(Target(self.component, fill(self.target, indices), param), self.rows)


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
def find_row(family: ModelFamily, component: str, module: str) -> tuple[Row, dict[str, int]] | None:
    """The row that a module of a component comes from, and its indices; every format asks for the same."""
    return _rows(family).get(component, _NO_ROWS).match(module)


def label(family: ModelFamily, slot: Slot, naming: str = "diffusers") -> str:
    """What people call a slot: its component and its name in `naming`, `text_encoder_2.….self_attn.q_proj`."""
    found = find_row(family, slot.component, slot.target.module)
    if found is not None:
        row, indices = found
        for names in (row.names.get(naming, ()), row.names.get("diffusers", ())):
            name = next((n for n in names if n.rows == slot.rows), None)
            if name is not None:
                return str(Target(slot.component, fill(name.module, indices), slot.param))
    return str(slot)
