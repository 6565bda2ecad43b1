"""Block weights: which share of its strength each module of an adapter gets, by names, globs and the known vectors.

A rule is `NAME=VALUE`. NAME is a component (`te`, `unet`), the beginning of a module's name in any naming the family's
table knows, whole segments at a time (`unet.down_blocks.1`, `double.0-5`: `double` stands for `double_blocks`, `0-5` for
any of these numbers), a glob over the whole name (`*.attn2.*`), or a block of the LoRA Block Weight extension of the web
UI (`IN04`, `MID`, `OUT03-OUT05`). A run of bare numbers is one of that extension's vectors. Of the rules that match a
module the last one counts; a module that no rule matches keeps its full strength.
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
# as hako-mikan's sd-webui-lora-block-weight orders them; 57 are FLUX' blocks alone (PR 1575 of sd-scripts)
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
    """`name` as it was written, or the block a vector's number is for; `vector`: it stands for a place in a vector."""

    name: str
    weight: float
    vector: bool = False


def parse(texts: Sequence[str], family: ModelFamily) -> tuple[Rule, ...]:
    """The rules of all `--blocks`; WrongUsage where they cannot be read or do not suit the family."""
    return tuple(rule for text in texts for rule in _parsed(text, family))


def _parsed(text: str, family: ModelFamily) -> Iterator[Rule]:
    """One option: numbers alone that follow one another make one vector."""
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
                f"--blocks {text!r}: {part or 'an empty rule'!r} is no NAME=VALUE", hint=_EXAMPLES
            )


_EXAMPLES = "for example --blocks 'unet.down_blocks.*=0.5,te=0', or a vector such as 1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise WrongUsage(f"--blocks {whole!r}: {text!r} is no number", hint=_EXAMPLES)
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
            f"--blocks: no vector of {len(values)} values is known for {family.title}", hint=fits
        )
    return (Rule(name, value, vector=True) for name, value in zip(names, values, strict=True))


class Blocks:
    """The rules at work on the modules of a merge: `weight` answers for one and keeps count for the report."""

    def __init__(self, texts: Sequence[str], family: ModelFamily) -> None:
        self.family = family
        self.rules = parse(texts, family)
        self._matched = [0] * len(self.rules)
        self._decided: dict[int | None, int] = {}
        self._known: dict[Slot, int | None] = {}
        self._seen: dict[str, None] = {}
        self._unnamed: dict[str, int] = {}

    def weight(self, slot: Slot) -> float:
        """What the strength is multiplied by here."""
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
        """After the last module: NoSuchName for a rule that matched none, WrongUsage for a block a vector leaves open."""
        for rule, matched in zip(self.rules, self._matched, strict=True):
            if not matched and not rule.vector:
                raise self._no_match(rule)
        if any(rule.vector for rule in self.rules) and not any(self._matched):
            raise WrongUsage("--blocks: the vector names no block that these adapters change")
        if self._unnamed:
            names = sorted(self._unnamed, key=(UNET + FLUX).index)
            count = sum(self._unnamed.values())
            raise WrongUsage(
                f"--blocks: the vector says nothing of {', '.join(names)}, where these adapters have {count} modules",
                hint=f"give the longer vector, or add {names[0]}=0 (what the web UI's extension does) or =1",
            )

    def _no_match(self, rule: Rule) -> NoSuchName:
        error = NoSuchName.among("block", rule.name, self._seen)
        error.message = f"--blocks: {rule.name!r} matches no module of these adapters"
        shown = _runs(self._seen)
        if not (error.hint or "").startswith("did"):
            error.hint = f"their blocks: {', '.join(shown[:8])}{f' and {len(shown) - 8} more' if shown[8:] else ''}"
        return error

    def records(self) -> list[dict[str, Any]]:
        """What each rule got: its name, its weight, the modules it decided for; those without a rule last."""
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
    """Blocks by the list they are numbered in, as a rule names them: `unet.down_blocks.0-2`."""
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
    """The block of the LoRA Block Weight extension this module stands in (`IN04`, `D003`); None outside of all."""
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
    """What a rule may call a module, the report's name first: every naming, under every name of its component, or none."""
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
    """Of a fused layer, what the names of its parts have in common: `transformer.transformer_blocks.3.attn`."""
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
