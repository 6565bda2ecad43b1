"""Block weights: factors of the strength of modules, by name, glob or vector.

A rule is `NAME=VALUE`; NAME is a pattern as of `--only` and `--skip` (adaptkit.ops.selecting).

A sequence of bare numbers is a vector of the web UI's LoRA Block Weight extension. The last
matching rule applies; a module that matches no rule keeps its full strength.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.errors import WrongUsage
from adaptkit.ops.selecting import (
    FLUX,
    SCHEMES,
    UNET,
    Named,
    is_block,
    matches,
    no_match,
    numbered,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptkit.families.contract import ModelFamily
    from adaptkit.names import Slot

__all__ = ["Blocks", "Rule", "parse"]


# the order of hako-mikan's sd-webui-lora-block-weight; 57 values are FLUX's blocks alone
# (PR 1575 of sd-scripts)
VECTORS: Mapping[tuple[str, int], tuple[str, ...]] = {
    ("unet", 17): (
        "BASE",
        *numbered("IN", (1, 2, 4, 5, 7, 8)),
        "M00",
        *numbered("OUT", range(3, 12)),
    ),
    ("unet", 26): UNET,
    ("sdxl", 12): ("BASE", *numbered("IN", (4, 5, 7, 8)), "M00", *numbered("OUT", range(6))),
    ("sdxl", 20): ("BASE", *numbered("IN", range(9)), "M00", *numbered("OUT", range(9))),
    ("flux", 57): FLUX[3:-1],
    ("flux", 61): FLUX,
}
NO_RULE = "(no rule)"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as written, or (`vector`) one number of a vector."""

    name: str
    weight: float
    vector: bool = False


def parse(texts: Sequence[str], family: ModelFamily) -> tuple[Rule, ...]:
    """Parse all `--blocks`; raise WrongUsage for invalid rules or vectors of other families."""
    return tuple(rule for text in texts for rule in _parsed(text, family))


def _parsed(text: str, family: ModelFamily) -> Iterator[Rule]:
    """Parse one option; consecutive bare numbers form a vector."""
    vector: list[float] = []
    for part in [*(item.strip() for item in text.split(",")), "="]:
        name, equals, number = part.rpartition("=")
        if not equals and part:
            vector.append(_number(part, text))
            continue
        if vector:
            yield from _spread(vector, family)
            vector = []
        if name:
            yield Rule(name.strip(), _number(number, text))
        elif part != "=":
            raise WrongUsage(
                f"--blocks {text!r}: expected NAME=VALUE, got {part or 'an empty rule'!r}",
                hint=_EXAMPLES,
            )


_EXAMPLES = (
    "for example --blocks 'unet.down_blocks.*=0.5,te=0', or a vector such as "
    "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"
)


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise WrongUsage(f"--blocks {whole!r}: expected a number, got {text!r}", hint=_EXAMPLES)
    return value


def _spread(values: Sequence[float], family: ModelFamily) -> Iterator[Rule]:
    scheme = SCHEMES.get(family.name, "")
    names = VECTORS.get((scheme, len(values)))
    if names is None:
        lengths = [str(n) for known, n in VECTORS if known == scheme]
        fits = (
            f"vectors for {family.title} have {' or '.join(lengths)} values"
            if lengths
            else "name blocks instead"
        )
        raise WrongUsage(
            f"--blocks: {family.title} has no vector of {len(values)} values", hint=fits
        )
    return (Rule(name, value, vector=True) for name, value in zip(names, values, strict=True))


class Blocks:
    """Apply the rules to the modules of a merge and count the matches for the report."""

    def __init__(self, texts: Sequence[str], family: ModelFamily) -> None:
        self.family = family
        self.rules = parse(texts, family)
        self._matched = [0] * len(self.rules)
        self._decided: dict[int | None, int] = {}
        self._known: dict[Slot, int | None] = {}
        self._seen: list[Named] = []
        self._unnamed: dict[str, int] = {}

    def weight(self, slot: Slot) -> float:
        """Return the factor of the strength of a module."""
        if not self.rules:
            return 1.0
        if slot not in self._known:
            self._known[slot] = self._decide(slot)
        number = self._known[slot]
        self._decided[number] = self._decided.get(number, 0) + 1
        return 1.0 if number is None else self.rules[number].weight

    def _decide(self, slot: Slot) -> int | None:
        module = Named.of(self.family, slot)
        block = module.block
        matching = [n for n, rule in enumerate(self.rules) if _matches(rule, module)]
        for n in matching:
            self._matched[n] += 1
        self._seen.append(module)
        if not matching and block is not None and any(rule.vector for rule in self.rules):
            self._unnamed[block] = self._unnamed.get(block, 0) + 1
        return matching[-1] if matching else None

    def check(self) -> None:
        """Check the rules after the last module.

        Raise NoSuchName for a rule without a match, WrongUsage for a block without a value.
        """
        for rule, matched in zip(self.rules, self._matched, strict=True):
            if not matched and not rule.vector:
                raise no_match("--blocks", rule.name, "these adapters", self._seen)
        if any(rule.vector for rule in self.rules) and not any(self._matched):
            raise WrongUsage("--blocks: the vector has no block of these adapters")
        if self._unnamed:
            names = sorted(self._unnamed, key=(UNET + FLUX).index)
            count = sum(self._unnamed.values())
            modules = "1 module" if count == 1 else f"{count} modules"
            raise WrongUsage(
                f"--blocks: the vector has no value for {', '.join(names)}, but these adapters "
                f"have {modules} there",
                hint=f"pass the longer vector, or add {names[0]}=0 (as the web UI does) or =1",
            )

    def notes(self) -> Iterator[str]:
        """Yield what the rules did, one sentence each."""
        for rule in self.records():
            if rule["modules"] and rule["weight"] != 1.0:
                what = "left out" if rule["weight"] == 0.0 else f"multiplied by {rule['weight']:g}"
                yield f"--blocks {rule['rule']}: {rule['modules']} modules {what}."

    def records(self) -> list[dict[str, Any]]:
        """Return name, weight and number of modules of each rule, then of no rule."""
        found: list[dict[str, Any]] = [
            {
                "rule": rule.name,
                "weight": rule.weight,
                "modules": self._decided.get(n, 0),
                "vector": rule.vector,
            }
            for n, rule in enumerate(self.rules)
        ]
        rest = self._decided.get(None, 0)
        return [
            *found,
            *([{"rule": NO_RULE, "weight": 1.0, "modules": rest, "vector": False}] if rest else []),
        ]


def _matches(rule: Rule, module: Named) -> bool:
    if rule.vector:
        return module.block is not None and is_block(rule.name, module.block)
    return matches(rule.name, module)
