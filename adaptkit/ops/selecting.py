"""Which modules a pattern means: one matcher for `--only`, `--skip` and `--blocks`.

A pattern is one of:

- a component (`unet`, `text_encoder_2`), or `te` for all text encoders, `te1` and `te2` for one;
- the first segments of a module's name in any naming of the family (`unet.down_blocks.1`,
  `double.0-5`: `double` stands for `double_blocks`, `0-5` for any of these numbers);
- a glob over the whole name (`*.attn2.*`);
- a block of the web UI's LoRA Block Weight extension (`IN04`, `MID`, `OUT03-OUT05`).
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.detect import families
from adaptkit.errors import NoSuchName
from adaptkit.keymap import compile_keys, label
from adaptkit.ops.blocks import NUMBERED, block_of
from adaptkit.ops.shared import LeftOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from adaptkit.families.contract import ModelFamily
    from adaptkit.names import Slot

__all__ = ["FLUX", "SCHEMES", "UNET", "Named", "Selection", "matches", "no_match"]


def numbered(stem: str, numbers: Iterable[int], width: int = 2) -> tuple[str, ...]:
    """Names of blocks: `IN00`, `IN01`, …"""
    return tuple(f"{stem}{n:0{width}}" for n in numbers)


UNET = ("BASE", *numbered("IN", range(12)), "M00", *numbered("OUT", range(12)))
FLUX = ("CLIP", "T5", "IN", *numbered("D", range(19), 3), *numbered("S", range(38), 3), "OUT")
SCHEMES = {"sd1": "unet", "sd2": "unet", "sdxl": "sdxl", "flux": "flux"}
_ALIASES = {"MID": "M00"}
_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.|(middle)_block\.")
_FLUX_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")
_RANGE = re.compile(r"(\d+)-(\d+)")
_TEXT = "text_encoder"
_NEAR, _SHOWN = 0.6, 8


class Named(NamedTuple):
    """A module by all its names, the report's first, and its block in the web UI's extension."""

    names: tuple[str, ...]
    component: str
    block: str | None

    @classmethod
    def of(cls, family: ModelFamily, slot: Slot, shown: str = "") -> Named:
        """All names of a slot; `shown` is one more, as a file spells it."""
        names = dict.fromkeys((*_names(family, slot), *_bare(shown, slot.component)))
        return cls(tuple(names), slot.component, block_name(family, slot))

    @property
    def stage(self) -> str:
        """The block of its own model that it is in."""
        return block_of(self.names[0], self.component)


def matches(pattern: str, module: Named) -> bool:
    """Whether a pattern means a module."""
    if pattern == module.component:
        return True
    if module.block is not None and is_block(pattern, module.block):
        return True
    wanted = pattern.split(".")
    return any(fnmatchcase(n, pattern) or _begins(n.split("."), wanted) for n in module.names)


def no_match(option: str, pattern: str, what: str, seen: Iterable[Named]) -> NoSuchName:
    """The error for a pattern that matches nothing, with the nearest names."""
    modules = list(seen)
    stages = dict.fromkeys(module.stage for module in modules)
    heads = dict.fromkeys(module.component for module in modules)
    heads |= dict.fromkeys("te" for name in heads if name.startswith(_TEXT))
    blocks = sorted({module.block for module in modules if module.block})
    known = dict.fromkeys((*heads, *stages, *blocks))
    near = get_close_matches(pattern, known, n=3, cutoff=_NEAR)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        shown = runs(stages)
        more = f" and {len(shown) - _SHOWN} more" if shown[_SHOWN:] else ""
        hint = f"{what} {'have' if what.endswith('s') else 'has'} the blocks "
        hint += f"{', '.join(shown[:_SHOWN])}{more}"
    return NoSuchName(f"{option}: {pattern!r} matches no module of {what}", hint=hint)


class Selection:
    """The modules that `--only` and `--skip` select; counts the matches of each pattern."""

    def __init__(self, only: Sequence[str], skip: Sequence[str], family: ModelFamily) -> None:
        self.only, self.skip, self.family = tuple(only), tuple(skip), family
        self._matched: set[tuple[str, str]] = set()
        self._modules: dict[Slot, Named] = {}
        self._kept: set[Slot] = set()

    def __call__(self, slot: Slot, shown: str) -> bool:
        """Whether a module is selected; `shown` is its name in the file."""
        if not (self.only or self.skip):
            return True
        module = Named.of(self.family, slot, shown)
        kept = self._decide(lambda pattern: matches(pattern, module))
        self._modules[slot] = module
        if kept:
            self._kept.add(slot)
        return kept

    def tensor(self, name: str, part: str) -> bool:
        """Whether a tensor that is no module is selected, by its name or its part (`vae`)."""
        return self._decide(lambda pattern: pattern == part or fnmatchcase(name, pattern))

    def _decide(self, means: Callable[[str], bool]) -> bool:
        only = [pattern for pattern in self.only if means(pattern)]
        skip = [pattern for pattern in self.skip if means(pattern)]
        self._matched |= {("only", pattern) for pattern in only}
        self._matched |= {("skip", pattern) for pattern in skip}
        return not skip and (bool(only) or not self.only)

    def check(self, what: str) -> None:
        """Raise NoSuchName for a pattern that matched nothing, after the last module.

        To skip a part that the family has and `what` has not is no mistake.
        """
        for option, patterns in (("only", self.only), ("skip", self.skip)):
            for pattern in patterns:
                known = option == "skip" and self._is_part(pattern)
                if (option, pattern) not in self._matched and not known:
                    raise no_match(f"--{option}", pattern, what, self._modules.values())

    def _is_part(self, name: str) -> bool:
        parts = [part.name for part in self.family.components]
        return name in parts or name in {head for part in parts for head in _heads(part)}

    @property
    def left_out(self) -> LeftOut | None:
        """What was left out; None if nothing was asked to be."""
        if not (self.only or self.skip):
            return None
        by = [f"--only {name}" for name in self.only] + [f"--skip {name}" for name in self.skip]
        return LeftOut(len(self._modules) - len(self._kept), len(self._modules), " ".join(by))


def runs(blocks: Iterable[str]) -> list[str]:
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
    """The block of a module in the LoRA Block Weight extension (`IN04`, `D003`)."""
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
    """Every name of a module, the report's first.

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
    return (name for stem in stems for name in _bare(stem, slot.component))


def _bare(stem: str, component: str) -> Iterator[str]:
    """A name, and what follows its component alone and after every short name of that."""
    if stem:
        bare = stem.removeprefix(f"{component}.")
        yield from (stem, bare, *(f"{head}.{bare}" for head in _heads(component)))


def _heads(component: str) -> tuple[str, ...]:
    """The short names of a component."""
    if not component.startswith(_TEXT):
        return ("unet",)
    return "te", f"te{component.removeprefix(_TEXT).lstrip('_') or '1'}"


def _whole(family: ModelFamily, slot: Slot) -> Iterator[str]:
    """The common prefix of the names of a fused layer's parts.

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


def is_block(name: str, block: str) -> bool:
    """Whether a name or a range of the extension means this block."""
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
