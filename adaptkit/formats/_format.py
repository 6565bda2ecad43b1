"""What a key format is: prefix, joiner, spelling overrides, and where alpha lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PEFT_SPELLING", "Alpha", "KeyFormat"]


class Alpha(Enum):
    """Where a format keeps alpha."""

    TENSOR = "tensor"  # one scalar tensor per module
    METADATA = "metadata"  # in the file's metadata or a config beside it; without it, alpha = rank
    OPTIONAL = "optional"  # a scalar tensor where alpha differs from rank, none where it does not


# PEFT and diffusers call the factors A (down) and B (up).
PEFT_SPELLING: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"lora": MappingProxyType({"up": "lora_B.weight", "down": "lora_A.weight"})}
)


@dataclass(frozen=True)
class KeyFormat:
    """How adapters are spelled.

    `prefixes` are templates filled with the tags of each component (`lora_{kohya}_`): the first is written, all are
    read. `joiner` joins the words of a module name. `style` picks the naming that is written (see
    `Component.namings`). `spelling` overrides the algorithms' default suffixes, by algorithm and role; whatever
    spelling an algorithm knows is read in every format.
    """

    name: str
    title: str
    prefixes: tuple[str, ...]
    joiner: str
    style: str
    alpha: Alpha
    spelling: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    written_by: str = ""
    note: str = ""
