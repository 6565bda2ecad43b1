"""set: a weight that replaces that of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._record import record
from adaptkit.algorithms._replaced import Replaced
from adaptkit.algorithms._stored import roles
from adaptkit.algorithms.contract import Role

if TYPE_CHECKING:
    from collections.abc import Mapping


@record
class Set(Replaced):
    """W' = value.

    ComfyUI calls it `set_weight` (`comfy/lora.py`). The control LoRAs of FLUX.1 store the scales of
    their norms so, as `scale`; diffusers overwrites those norms too.
    """

    name: ClassVar[str] = "set"
    title: ClassVar[str] = "replaced weight"
    roles: ClassVar[Mapping[str, Role]] = roles(value=Role("set_weight", ("scale",)))
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"value"}),)


ALGORITHM = Set
