"""Detect family and format from a header, with evidence.

Every pair is scored, in no order.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.errors import AdaptkitError, NoSuchName
from adaptkit.keymap import algorithms, compile_checkpoint, compile_keys, prefixes, split_suffix
from adaptkit.names import WEIGHT
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

    from adaptkit.families.contract import Component, Mark, ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.keymap import KeyMap
    from adaptkit.names import Slot

__all__ = [
    "Detection",
    "chosen",
    "detect_adapter",
    "detect_checkpoint",
    "families",
    "formats",
    "is_adapter",
]

# spellings of adapters in general: a kind adaptkit cannot read must not pass for a checkpoint
_FOREIGN = re.compile(
    r"lora|_lora\d?\.|lokr_|hada_|glora|oft_|boft_|dora_scale|ia3_|on_input$|magnitude"
    r"|\.alpha$|\.[ab][12]\.weight$"
)

_HEAD = re.compile(r"[^{\d]*")
# suffixes that checkpoints have too
_PLAIN = frozenset({"weight", "bias", "scale", "up.weight", "down.weight"})

# (share of a family's marks that hold, number of complete runs of blocks)
_Evidence = tuple[float, int]

SAMPLE = 48  # names that every family is tried on first
ENOUGH = 0.5  # share of the keys; another family that shares a few names claims fewer


@dataclass(frozen=True)
class Detection:
    """The winner and the evidence: `claimed` of `total` keys, runner-up and equal look-alikes."""

    family: str | None
    format: str | None
    claimed: int
    total: int
    runner_up: tuple[str, str | None, int] | None = None
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, order=True)
class _Score:
    claimed: int
    family: str
    format: str | None


def families() -> Mapping[str, ModelFamily]:
    """Every model family by name."""
    return discover("adaptkit.families", "FAMILY")


def formats() -> Mapping[str, KeyFormat]:
    """Every key format by name."""
    return discover("adaptkit.formats", "FORMAT")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether most keys are spelled as an adapter's, even of an unsupported kind."""
    names = list(names)
    # only IA³ files have `on_input`
    gates = {name.removesuffix("on_input") for name in names if name.endswith(".on_input")}
    return 2 * sum(_is_adapters(name, gates) for name in names) > len(names)


def _is_adapters(name: str, gates: Set[str]) -> bool:
    """Whether a key is spelled as an adapter's.

    IA³ calls its vector `weight`, which means an adapter only together with an `on_input`.
    """
    found = split_suffix(name)
    if found is not None and found[1] in _PLAIN and _FOREIGN.search(name) is None:
        return f"{found[0]}." in gates
    return found is not None or _FOREIGN.search(name) is not None


def chosen(kind: str, known: Mapping[str, object], name: str | None) -> tuple[str, ...]:
    """The names to consider: all, or the given one.

    Raises `NoSuchName` if it is unknown.
    """
    if name is None:
        return tuple(known)
    if name not in known:
        raise NoSuchName.among(kind, name, known)
    return (name,)


def detect_adapter(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    family: str | None = None,
    format: str | None = None,
) -> Detection:
    """Score every (family, format) by claimed keys.

    Ties are broken by metadata, then by shapes.

    `family` and `format` restrict the search. A winner must claim at least half of the keys.
    """
    stems = Counter(found[0] for name in infos if (found := split_suffix(name)) is not None)
    names = chosen("family", families(), family)
    pairs = [
        pair for kind in chosen("format", formats(), format) for pair in _likely(stems, kind, names)
    ]
    scores: dict[_Pair, _Score] = {}
    first = second = 0  # the most keys that a pair claims, and the next most
    for pair in sorted(pairs, key=lambda pair: -pair.most):
        # `most` bounds what a pair can claim, and pairs come in descending order of it
        if pair.most < second:
            break  # neither this pair nor a later one can be winner or runner-up
        if len(names) > 1 and pair.estimate() < ENOUGH / 2 * first:
            continue
        scores[pair] = score = pair.score()
        first, second = max(first, score.claimed), max(second, min(first, score.claimed))
    # in the order of the tables, which breaks ties
    ordered = [scores[pair] for pair in pairs if pair in scores]
    return _decide(ordered, len(infos), metadata, _adapter_shapes(infos), bool(family))


@dataclass(frozen=True, eq=False)
class _Pair:
    """A family in a format, with the stems that begin like its names.

    `most` counts the keys of these stems, an upper bound on what it claims. `total` counts the keys
    of all stems of the format.
    """

    family: str
    format: str
    near: Mapping[str, int]
    most: int
    sample: Sequence[str]
    total: int

    def estimate(self) -> float:
        """Estimate the number of claimed keys from the sample."""
        return (
            self.total
            * sum(map(compile_keys(self.family, self.format).claims, self.sample))
            / len(self.sample)
        )

    def score(self) -> _Score:
        """Count the claimed keys."""
        claims = compile_keys(self.family, self.format).claims
        return _Score(
            sum(n for stem, n in self.near.items() if claims(stem)), self.family, self.format
        )


@cache
def _starts(format: str) -> tuple[str, ...]:
    """Every prefix of a format, over all families."""
    parts = (part for family in families().values() for part in family.components)
    return tuple(dict.fromkeys(p for part in parts for p in prefixes(part, formats()[format])))


def _likely(stems: Mapping[str, int], format: str, names: Sequence[str]) -> Iterator[_Pair]:
    """The families worth scoring in a format, judged by a sample."""
    starts = _starts(format)
    found = [stem for stem in stems if stem.startswith(starts)]
    if not found:
        return
    sample, total = found[:: max(1, len(found) // SAMPLE)], sum(stems[stem] for stem in found)
    enough = ENOUGH / 2 * len(sample) if len(names) > 1 else 0
    for name in names:
        heads = _heads(name, format)
        if sum(stem.startswith(heads) for stem in sample) >= enough:
            near = {stem: stems[stem] for stem in found if stem.startswith(heads)}
            yield _Pair(name, format, near, sum(near.values()), sample, total)


@cache
def _heads(family: str, format: str) -> tuple[str, ...]:
    """The beginnings of a family's names up to the first number.

    They rule out most families without compiling their tables.
    """
    kind = formats()[format]
    found: dict[str, None] = {}
    for part in families()[family].components:
        if starts := prefixes(part, kind):
            words = [word.replace(".", kind.joiner) for word in _words(part)]
            found |= dict.fromkeys(start + word for start in starts for word in words)
    return tuple(found)


@cache
def _words(part: Component) -> tuple[str, ...]:
    """The beginnings of a component's module names up to the first number."""
    modules = (name.module for row in part.rows for names in row.names.values() for name in names)
    # the pattern matches any string, if only at its start
    return tuple({_HEAD.match(module)[0]: None for module in modules})  # type: ignore[index]


def detect_checkpoint(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, family: str | None = None
) -> Detection:
    """Score every family by claimed checkpoint keys; the answer has no format.

    A sample of the keys rules out families that would claim too few.
    """
    names = chosen("family", families(), family)
    apart = {prefixes for kind in families().values() for prefixes in kind.others.values()}
    beside = tuple(chain.from_iterable(apart))
    own = [name for name in infos if not name.startswith(beside)]
    sample = own[:: max(1, len(own) // SAMPLE)]
    near = {name: sum(key.startswith(_checkpoint_heads(name)) for key in sample) for name in names}
    counts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: -near[name]):
        keys = compile_checkpoint(name)
        if len(names) > 1:
            # half of ENOUGH leaves room for an unrepresentative sample
            least = ENOUGH / 2 * max(counts.values(), default=1) * len(sample) / max(1, len(own))
            if near[name] < least or sum(map(keys.claims, sample)) < least:
                continue
        counts[name] = sum(map(keys.claims, infos))
    # in the order of the tables, which breaks ties
    scores = [_Score(counts[name], name, None) for name in names if name in counts]
    return _decide(
        scores, len(own), metadata, lambda score: _checkpoint_marks(infos, score), bool(family)
    )


@cache
def _checkpoint_heads(family: str) -> tuple[str, ...]:
    """The beginnings of a family's checkpoint keys up to the first number."""
    found: dict[str, None] = {}
    for part in families()[family].components:
        for start in chain.from_iterable(part.checkpoints.values()):
            found |= dict.fromkeys(start + word for word in _words(part))
    return tuple(found)


def _decide(
    scores: list[_Score],
    total: int,
    metadata: Mapping[str, str],
    evidence: Callable[[_Score], _Evidence],
    forced: bool,
) -> Detection:
    ranked = sorted(scores, key=lambda score: -score.claimed)
    best = ranked[0] if ranked else _Score(0, "", None)
    if best.claimed == 0 or (best.claimed <= ENOUGH * total and not forced):
        return Detection(None, None, best.claimed, total)
    tied = [score for score in ranked if score.claimed == best.claimed]
    marks = {
        score: (_named_in(metadata, score.family), evidence(score) if len(tied) > 1 else (0.0, 0))
        for score in tied
    }
    tied.sort(key=lambda score: marks[score], reverse=True)  # stable: table order breaks ties
    leaders = [score for score in tied if marks[score] == marks[tied[0]]]
    # if names and shapes cannot decide, `yields_to` names the likelier family
    tied = sorted(leaders, key=lambda score: _yields(score, leaders)) + tied[len(leaders) :]
    winner = tied[0]
    alike = tuple(
        score.family
        for score in tied[1:]
        if marks[score] == marks[winner] and score.family != winner.family
    )
    other = next((s for s in ranked if s != winner and s.claimed), None)
    runner_up = (other.family, other.format, other.claimed) if other else None
    return Detection(winner.family, winner.format, winner.claimed, total, runner_up, alike)


def _yields(score: _Score, tied: Sequence[_Score]) -> bool:
    """Whether another of the tied families is likelier."""
    return bool({other.family for other in tied} & set(families()[score.family].yields_to))


def _named_in(metadata: Mapping[str, str], family: str) -> bool:
    """Whether `modelspec.architecture` or `ss_base_model_version` names this family."""
    values = (metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", ""))
    marks = families()[family].architectures
    return any(value.lower().removesuffix("/lora").startswith(marks) for value in values if value)


@dataclass(frozen=True, slots=True)
class _Size:
    """The size of a module's weight; None for unknown dimensions."""

    rows: int | None
    columns: int
    kernel: tuple[int, ...] | None


def _score_mark(mark: Mark, size: _Size) -> int:
    """+1 if a shape fits the mark, -1 if not, 0 if unknown."""
    if mark.columns is not None:
        return 1 if _among(size.columns, mark.columns) else -1
    if mark.rows is not None:
        return 0 if size.rows is None else (1 if _among(size.rows, mark.rows) else -1)
    return 0 if size.kernel is None else (1 if size.kernel == mark.kernel else -1)


def _among(value: int, known: int | tuple[int, ...]) -> bool:
    return value == known if isinstance(known, int) else value in known


def _sum_marks(family: ModelFamily, sizes: Iterable[tuple[Slot, _Size]]) -> float:
    """The share of marks that hold; 0.5 if none is present.

    Each mark is judged by its first module.
    """
    seen: dict[Mark, int] = {}
    for slot, size in sizes:
        for mark in family.marks:
            if mark.component == slot.component and slot.target.module.endswith(mark.suffix):
                seen.setdefault(mark, _score_mark(mark, _whole(slot, size)))
    shown = [mark for mark in seen.values() if mark]
    return shown.count(1) / len(shown) if shown else 0.5


def _runs(keys: KeyMap, slots: Iterable[Slot]) -> int:
    """Count the complete runs of blocks (FLUX.1: 19 double, 38 single).

    A run counts if its last block is in the file.
    """
    return len({run for slot in slots for run in keys.ends(slot.target)})


def _whole(slot: Slot, part: _Size) -> _Size:
    """The size of the target of which a slot is a part."""
    if slot.rows is None or part.rows is None:
        return part
    return replace(part, rows=part.rows * slot.rows.total // (slot.rows.stop - slot.rows.start))


def _adapter_shapes(infos: Mapping[str, TensorInfo]) -> Callable[[_Score], _Evidence]:
    """A function from a score to its marks.

    The facts of stems are computed only for a tie.
    """
    sizes: dict[str, _Size] = {}

    def evidence(score: _Score) -> _Evidence:
        if not sizes:
            sizes.update(_stem_sizes(infos))
        keys = compile_keys(score.family, score.format or "")
        found = [
            (slot, size) for stem, size in sizes.items() if (slot := keys.slot(stem)) is not None
        ]
        return _sum_marks(families()[score.family], found), _runs(keys, [slot for slot, _ in found])

    return evidence


def _stem_sizes(infos: Mapping[str, TensorInfo]) -> dict[str, _Size]:
    groups: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for name, info in infos.items():
        if (found := split_suffix(name)) is not None:
            for algorithm, role in found[2]:
                groups.setdefault(found[0], {}).setdefault(algorithm, {})[role] = info.shape
    sizes: dict[str, _Size] = {}
    for stem, by_algorithm in groups.items():
        for algorithm, shapes in by_algorithm.items():
            kind = algorithms()[algorithm]
            given = {role: shape for role, shape in shapes.items() if role != ALPHA}
            # an incomplete set of tensors has no reliable shape
            if frozenset(given) not in kind.forms:
                continue
            try:
                said = kind.facts(given)
            except AdaptkitError:
                continue
            if said.columns and not said.vector:
                sizes[stem] = _Size(said.rows or None, said.columns, said.kernel)
    return sizes


def _checkpoint_marks(infos: Mapping[str, TensorInfo], score: _Score) -> _Evidence:
    keys = compile_checkpoint(score.family)
    shapes = (
        (place.slot, info.shape)
        for name, info in infos.items()
        if (place := keys.parse(name)) is not None
    )
    matrices = (
        (slot, _Size(shape[0], shape[1], shape[2:]))
        for slot, shape in shapes
        if slot.param == WEIGHT and len(shape) > 1
    )
    return _sum_marks(families()[score.family], matrices), 0
