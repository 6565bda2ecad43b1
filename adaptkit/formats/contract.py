"""The definition of a key format: prefix, joiner, spelling overrides, storage of alpha."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMFY_SPELLING", "PEFT_SPELLING", "Alpha", "KeyFormat"]


class Alpha(Enum):
    """Storage of alpha in a format."""

    TENSOR = "tensor"  # one scalar tensor per module
    CONFIG = "config"  # in adapter_config.json next to the file
    NONE = "none"  # no place that every host reads: the scale is folded into the weights
    OPTIONAL = "optional"  # a scalar tensor if alpha differs from the rank, else nothing


# PEFT and diffusers call the factors A (down) and B (up)
PEFT_SPELLING: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "lora": MappingProxyType({"up": "lora_B.weight", "down": "lora_A.weight"}),
        "lora+dora": MappingProxyType({"up": "lora_B.weight", "down": "lora_A.weight"}),
        # read for every layer with a LoRA; the vectors of norms have no place there
        "full": MappingProxyType({"diff_b": "lora_B.bias"}),
    }
)
# ComfyUI reads both spellings of the factors, but the magnitude only as `dora_scale`
COMFY_SPELLING: Mapping[str, Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(("lora", "lora+dora"), PEFT_SPELLING["lora"])
)


@dataclass(frozen=True)
class KeyFormat:
    """The spelling of adapter keys.

    `prefixes` are templates filled with the tags of each component (`lora_{kohya}_`): the first is
    written, all are read. A format brings tags of its own in `tags`, by the name of the component,
    for the template field `{own}`. `joiner` joins the words of a module name.

    `style` picks the naming that is written, see `Component.namings`. A `private` format reads and
    writes that naming alone, and no other format does. Formats of one `kin` name the modules of
    unknown families alike.

    `spelling` overrides the default suffixes by algorithm and role. Any spelling that an algorithm
    knows is read in every format. `owns` are the algorithms of a format that holds only those;
    then no other format holds them. `peft` means that DoRA magnitudes are laid out as PEFT has
    them, `[out]` or `[1, out, 1, 1]`, not as LyCORIS, `[out, 1, …]`.
    """

    name: str
    title: str
    prefixes: tuple[str, ...]
    joiner: str
    style: str
    alpha: Alpha
    spelling: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    private: bool = False
    owns: tuple[str, ...] = ()
    peft: bool = False
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    kin: str = ""
    written_by: str = ""
    note: str = ""
