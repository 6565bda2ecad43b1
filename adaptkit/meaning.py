"""What stored numbers mean to a reader: alpha and its source, the configuration, the weights.

Files are read through this module, and every tensor that is written passes `as_read` first. So the
weights that a report measures are those that a reader finds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import ALPHA, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, Weights

__all__ = ["AsRead", "Meaning", "as_read"]

DIFFUSERS_CONFIG = "lora_adapter_metadata"
# the settings of PEFT's OFT that adaptkit computes; tensors do not show others
SUPPORTED: Mapping[str, object] = MappingProxyType(
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False}
)


@dataclass(frozen=True)
class Meaning:
    """What metadata and configuration say about the tensors of a file.

    `configs` are the fields of PEFT's configuration: one, or one per component in the metadata of
    diffusers. `config` is PEFT's adapter_config.json alone.
    """

    configs: Mapping[str, Mapping[str, object]]
    config: Mapping[str, object]

    @classmethod
    def of(cls, metadata: Mapping[str, str], config: Mapping[str, object] | None) -> Meaning:
        """From the metadata of a file, or from the configuration beside it."""
        if config is not None:
            return cls({"": config}, config)
        try:
            stored = json.loads(metadata.get(DIFFUSERS_CONFIG, "{}"))
        except ValueError:
            stored = {}
        parts: dict[str, dict[str, object]] = {}
        for name, value in stored.items() if isinstance(stored, dict) else ():
            component, _, key = name.partition(".")
            parts.setdefault(component, {})[key] = value
        return cls(parts, {})

    def alpha(self, component: str, module: str, stored: float | None) -> tuple[Stated | None, str]:
        """The alpha of a module and its source: tensor, metadata or none.

        `stored` is the alpha tensor of the module, which counts before any configuration.
        `module` is its name in the file.
        """
        if stored is not None:
            return Stated(stored), "tensor"
        found = self._configured(component, module)
        return found, "none" if found is None else "metadata"

    def _configured(self, component: str, module: str) -> Stated | None:
        config = self.configs.get(component) or self.configs.get("") or {}
        usual = config.get("lora_alpha", config.get("alpha"))
        alpha = _pattern(config.get("alpha_pattern"), module, usual)
        if not isinstance(alpha, int | float):
            return None
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        known = rank if isinstance(rank, int) else None
        return Stated(float(alpha), known, bool(config.get("use_rslora")))

    def unsupported(self) -> list[str]:
        """Settings of the configuration that adaptkit does not compute."""
        if self.config.get("peft_type") != "OFT":
            return []
        return [
            f"{name} = {self.config[name]}: this kind of OFT is not supported"
            for name, value in SUPPORTED.items()
            if self.config.get(name, value) != value
        ]


def _pattern(patterns: object, module: str, default: object) -> object:
    """The value of the first pattern that matches the end of a module's name.

    Found as PEFT's `get_pattern_key` finds it.
    """
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


class AsRead(NamedTuple):
    """Stored tensors as their reader understands them. `alpha` is None without a tensor of it."""

    weights: Weights
    facts: Facts
    shapes: dict[str, tuple[int, ...]]
    alpha: float | None


def as_read(kind: type[Weights], stored: Mapping[str, Tensor], *, batch: int = 0) -> AsRead:
    """Read the rounded tensors of a module by role, as the file is read.

    `batch` is the number of leading dimensions of a stack of modules. Raises ShapeMismatch or
    NonFinite if a reader would refuse the tensors.
    """
    shapes = {role: tuple(tensor.shape[batch:]) for role, tensor in stored.items() if role != ALPHA}
    alpha = float(stored[ALPHA]) if ALPHA in stored else None
    facts = kind.facts(shapes, None if alpha is None else Stated(alpha))
    weights = kind.decode({role: stored[role] for role in shapes}, facts)
    return AsRead(weights, facts, shapes, alpha)
