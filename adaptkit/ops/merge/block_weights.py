"""Block weights: factors of the strength of modules, by name, glob or vector.

A rule is `NAME=VALUE`. NAME is one of:

- a component (`te`, `unet`);
- the first segments of a module's name in any naming of the family (`unet.down_blocks.1`,
  `double.0-5`: `double` stands for `double_blocks`, `0-5` for any of these numbers);
- a glob over the whole name (`*.attn2.*`);
- a block of the web UI's LoRA Block Weight extension (`IN04`, `MID`, `OUT03-OUT05`).

A sequence of bare numbers is a vector of that extension. The last matching rule applies; a module
that matches no rule keeps its full strength.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from adaptkit.detect import families
from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.keymap import compile_keys, label
from adaptkit.ops.blocks import NUMBERED, block_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adaptkit.families.contract import ModelFamily
    from adaptkit.names import Slot

__all__ = ["Blocks", "Rule", "parse"]


def _numbered(stem: str, numbers: Iterable[int], width: int = 2) -> tuple[str, ...]:
    return tuple(f"{stem}{n:0{width}}" for n in numbers)


UNET = ("BASE", *_numbered("IN", range(12)), "M00", *_numbered("OUT", range(12)))
FLUX = ("CLIP", "T5", "IN", *_numbered("D", range(19), 3), *_numbered("S", range(38), 3), "OUT")
# the order of hako-mikan's sd-webui-lora-block-weight; 57 values are FLUX's blocks alone
# (PR 1575 of sd-scripts)
VECTORS: Mapping[tuple[str, int], tuple[str, ...]] = {
    ("unet", 17): (
        "BASE",
        *_numbered("IN", (1, 2, 4, 5, 7, 8)),
        "M00",
        *_numbered("OUT", range(3, 12)),
    ),
    ("unet", 26): UNET,
    ("sdxl", 12): ("BASE", *_numbered("IN", (4, 5, 7, 8)), "M00", *_numbered("OUT", range(6))),
    ("sdxl", 20): ("BASE", *_numbered("IN", range(9)), "M00", *_numbered("OUT", range(9))),
    ("flux", 57): FLUX[3:-1],
    ("flux", 61): FLUX,
}
SCHEMES = {"sd1": "unet", "sd2": "unet", "sdxl": "sdxl", "flux": "flux"}
_ALIASES = {"MID": "M00"}
_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.|(middle)_block\.")
_FLUX_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")
_RANGE = re.compile(r"(\d+)-(\d+)")
_TEXT = "text_encoder"
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
        self._seen: dict[str, None] = {}
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
        block = block_name(self.family, slot)
        names = tuple(_names(self.family, slot))
        matching = [n for n, rule in enumerate(self.rules) if _matches(rule, block, names)]
        for n in matching:
            self._matched[n] += 1
        self._seen[block_of(names[0], slot.component)] = None
        if not matching and block is not None and any(rule.vector for rule in self.rules):
            self._unnamed[block] = self._unnamed.get(block, 0) + 1
        return matching[-1] if matching else None

    def check(self) -> None:
        """Check the rules after the last module.

        Raise NoSuchName for a rule without a match, WrongUsage for a block without a value.
        """
        for rule, matched in zip(self.rules, self._matched, strict=True):
            if not matched and not rule.vector:
                raise self._no_match(rule)
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

    def _no_match(self, rule: Rule) -> NoSuchName:
        error = NoSuchName.among("block", rule.name, self._seen)
        error.message = f"--blocks: {rule.name!r} matches no module of these adapters"
        shown = _runs(self._seen)
        if not (error.hint or "").startswith("did"):
            more = f" and {len(shown) - 8} more" if shown[8:] else ""
            error.hint = f"the adapters have the blocks {', '.join(shown[:8])}{more}"
        return error

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


def _runs(blocks: Iterable[str]) -> list[str]:
    """Join the numbered blocks of a list to a range: `unet.down_blocks.0-2`."""
    numbers: dict[str, list[int]] = {}
    for block in blocks:
        found = NUMBERED.fullmatch(block)
        numbers.setdefault(found[1] if found else block, []).extend(
            [int(found[2])] if found else []
        )
    ends = {name: (min(held), max(held)) for name, held in numbers.items() if held}
    return [
        f"{n}.{'-'.join(str(e) for e in dict.fromkeys(ends[n]))}" if n in ends else n
        for n in numbers
    ]


def block_name(family: ModelFamily, slot: Slot) -> str | None:
    """Return the block of a module in the LoRA Block Weight extension (`IN04`, `D003`)."""
    scheme = SCHEMES.get(family.name)
    if scheme is None:
        return None
    if slot.component.startswith(_TEXT):
        return "BASE" if scheme != "flux" else "CLIP" if slot.component == _TEXT else "T5"
    native = label(family, slot, "native").partition(".")[2]
    if scheme == "flux":
        return _flux_block(str(slot.target).partition(".")[2])
    found = _UNET_BLOCK.match(native)
    if found is None:
        return None
    return "M00" if found[3] else f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}"


def _flux_block(native: str) -> str:
    found = _FLUX_BLOCK.match(native)
    if found is None:
        return "OUT" if native.startswith("final_layer") else "IN"
    return f"{'D' if found[1] == 'double' else 'S'}{int(found[2]):03}"


def _names(family: ModelFamily, slot: Slot) -> Iterator[str]:
    """Yield every name of a module, the report's first.

    These are all namings, with every name of the component and without it.
    """
    stems = dict.fromkeys(
        (
            label(family, slot),
            label(family, slot, "native"),
            str(slot.target),
            *_whole(family, slot),
        )
    )
    number = slot.component.removeprefix(_TEXT).lstrip("_") or "1"
    heads = ("te", f"te{number}") if slot.component.startswith(_TEXT) else ("unet",)
    for stem in stems:
        yield stem
        bare = stem.removeprefix(f"{slot.component}.")
        yield bare
        yield from (f"{head}.{bare}" for head in heads)


def _whole(family: ModelFamily, slot: Slot) -> Iterator[str]:
    """Yield the common prefix of the names of a fused layer's parts.

    An example is `transformer.transformer_blocks.3.attn`.
    """
    known = slot.rows is None and family.name in families()
    parts = compile_keys(family.name, "diffusers").slots(slot.target) if known else ()
    if len(parts) > 1:
        yield ".".join(
            segments[0] for segments in _alike(label(family, part).split(".") for part in parts)
        )


def _alike(names: Iterable[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    return takewhile(lambda segments: len(set(segments)) == 1, zip(*names, strict=False))


def _matches(rule: Rule, block: str | None, names: Iterable[str]) -> bool:
    if block is not None and _is_block(rule.name, block):
        return True
    if rule.vector:
        return False
    wanted = rule.name.split(".")
    return any(fnmatchcase(name, rule.name) or _begins(name.split("."), wanted) for name in names)


def _is_block(name: str, block: str) -> bool:
    first, _, last = name.partition("-")
    ends = [_ALIASES.get(end, end) for end in (first, last or first)]
    for order in (UNET, FLUX):
        if block in order and ends[0] in order and ends[1] in order:
            return order.index(ends[0]) <= order.index(block) <= order.index(ends[1])
    return False


def _begins(segments: Sequence[str], wanted: Sequence[str]) -> bool:
    return len(wanted) <= len(segments) and all(map(_segment, segments, wanted))


def _segment(segment: str, wanted: str) -> bool:
    if (numbers := _RANGE.fullmatch(wanted)) is not None:
        return segment.isdigit() and int(numbers[1]) <= int(segment) <= int(numbers[2])
    return any(fnmatchcase(segment, wanted + end) for end in ("", "_block", "_blocks"))
