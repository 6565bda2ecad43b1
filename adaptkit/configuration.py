"""What a PEFT configuration and a file's metadata say about the weights.

Read in one place, so that every verb gives a file the same meaning. What cannot be honoured is a
`Problem`; one of severity `error` stops every verb but `inspect`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["DIFFUSERS_CONFIG", "PEFT_CONFIG", "Configuration", "Problem", "refuse_errors"]

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
# PEFT subtracts what these put into the factors from the base (peft/tuners/lora/layer.py), so the
# adapter alone is not the difference; `loftq` quantises the base instead
REBASED = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga", re.IGNORECASE)
# what an OFT adapter says of its rotation, and the only value that is computed here
OFT_DEFAULTS: Mapping[str, object] = {
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "coft": False,
}
# metadata keys that state alpha for a whole file, without saying for which modules
FLAT_ALPHA = ("lora_alpha", "alpha", "network_alpha")


class Problem(NamedTuple):
    """Something wrong with a file: `error` if it cannot be used as it is, else `warning`."""

    severity: str
    module: str | None
    what: str


def refuse_errors(problems: Iterable[Problem], path: Path) -> None:
    """NotRepresentable for the first problem of the whole file that is an error."""
    for problem in problems:
        if problem.severity == "error" and problem.module is None:
            raise NotRepresentable(
                problem.what,
                hint="`adaptkit inspect` lists the problems of a file",
                file=path,
            )


@dataclass(frozen=True)
class Configuration:
    """PEFT's LoraConfig fields: of the whole file (component ""), or per component.

    diffusers writes them per component, into the metadata.
    """

    configs: Mapping[str, Mapping[str, object]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, str], config: Mapping[str, object] | None) -> Configuration:
        """From PEFT's adapter_config.json if there is one, else from the file's metadata."""
        if config is not None:
            return cls({"": config}, metadata)
        try:
            stored = json.loads(metadata.get(DIFFUSERS_CONFIG, "{}"))
        except (ValueError, RecursionError):
            stored = {}
        parts: dict[str, dict[str, object]] = {}
        for name, value in stored.items() if isinstance(stored, dict) else ():
            component, _, key = name.rpartition(".")
            parts.setdefault(component, {})[key] = value
        return cls(parts, metadata)

    def alpha(self, component: str, module: str) -> Stated | None:
        """Alpha of a module, named as the file names it; None if no configuration states one."""
        config = self.configs.get(component) or self.configs.get("") or {}
        default = config.get("lora_alpha", config.get("alpha"))
        alpha = _pattern(config.get("alpha_pattern"), module, default)
        if not isinstance(alpha, int | float):
            return None
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        rank_scaled = bool(config.get("use_rslora"))
        return Stated(float(alpha), rank if isinstance(rank, int) else None, rank_scaled)

    def problems(self) -> Iterator[Problem]:
        """What the configuration asks for that cannot be honoured."""
        for component, config in self.configs.items():
            where = f"{component}: " if component else ""
            yield from (Problem("error", None, where + what) for what in _unsupported(config))

    def unused_alpha(self) -> Iterator[Problem]:
        """Alphas in the metadata that no reader applies; for a file that states none elsewhere."""
        found = [f"{key} = {self.metadata[key]}" for key in FLAT_ALPHA if key in self.metadata]
        if found:
            what = (
                f"the metadata states {', '.join(found)}, which hosts ignore: alpha = rank is used"
            )
            yield Problem("warning", None, what)


def _unsupported(config: Mapping[str, object]) -> Iterator[str]:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and REBASED.fullmatch(init):
        yield (
            f"init_lora_weights = {init}: the training changed the base weights too, so the "
            "factors alone are not the difference; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("peft_type") != "OFT":
        return
    for name, usual in OFT_DEFAULTS.items():
        if config.get(name, usual) != usual:
            yield f"{name} = {config[name]}: this kind of OFT is not supported"


def _pattern(patterns: object, module: str, default: object) -> object:
    """The value of the first pattern that matches the end of a module's name.

    As PEFT's `get_pattern_key` (peft/utils/other.py).
    """
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
