"""What is this file: header in, family and format out, with the evidence. No ordered `elif`: every pair is scored."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import NoSuchName, ShapeMismatch
from adaptkit.keymap import algorithms, compile_checkpoint, compile_keys, prefixes, split_suffix
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from adaptkit.families._family import Mark, ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.formats._format import KeyFormat
    from adaptkit.names import Slot

__all__ = ["Detection", "chosen", "detect_adapter", "detect_checkpoint", "families", "formats", "is_adapter"]

# spellings of adapters in general, so that one adaptkit cannot read yet is not called a checkpoint
_FOREIGN = re.compile(
    r"lora|lokr_|hada_|glora|oft_|boft_|dora_scale|ia3_|on_input$|magnitude|\.alpha$|\.[ab][12]\.weight$"
)

ENOUGH = 0.5  # of the keys: fewer claimed, and it is some other family that shares a few names


@dataclass(frozen=True)
class Detection:
    """The winner and the evidence: keys `claimed` of `total`, the best other pair, and look-alikes that claim as many."""

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
    """Whether most of these keys are spelled as an adapter's, of a kind adaptkit reads or of another."""
    names = list(names)
    return 2 * sum(split_suffix(name) is not None or _FOREIGN.search(name) is not None for name in names) > len(names)


def chosen(kind: str, known: Mapping[str, object], name: str | None) -> tuple[str, ...]:
    """The names to consider: all, or the one given; NoSuchName where nobody knows it."""
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
    """Score every (family, format) by claimed keys; break ties by metadata, then by shapes.

    `family` and `format` restrict the search. A winner that claims less than half of the keys is no winner.
    """
    splits = [found for name in infos if (found := split_suffix(name)) is not None]
    stems = Counter(stem for stem, _, _ in splits)
    scores: list[_Score] = []
    for format_name in chosen("format", formats(), format):
        for family_name in chosen("family", families(), family):
            scores.append(_Score(_claimed(stems, family_name, format_name), family_name, format_name))
    return _decide(scores, len(infos), metadata, _adapter_shapes(infos), bool(family))


def _claimed(stems: Mapping[str, int], family: str, format: str) -> int:
    """How many keys a pair claims; the tables are compiled only where a prefix occurs at all."""
    starts = tuple(p for part in families()[family].components for p in prefixes(part, formats()[format]))
    near = [(stem, n) for stem, n in stems.items() if stem.startswith(starts)]
    return sum(n for stem, n in near if compile_keys(family, format).slot(stem) is not None)


def detect_checkpoint(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, family: str | None = None
) -> Detection:
    """Score every family by claimed checkpoint keys; `format` of the answer is None."""
    scores, others = [], 0
    for family_name in chosen("family", families(), family):
        keys = compile_checkpoint(family_name)
        scores.append(_Score(sum(keys.parse(name) is not None for name in infos), family_name, None))
        others = max(others, sum(keys.other(name) is not None for name in infos))
    return _decide(scores, len(infos) - others, metadata, lambda score: _checkpoint_marks(infos, score), bool(family))


def _decide(
    scores: list[_Score],
    total: int,
    metadata: Mapping[str, str],
    evidence: Callable[[_Score], int],
    forced: bool,
) -> Detection:
    ranked = sorted(scores, key=lambda score: -score.claimed)
    best = ranked[0]
    if best.claimed == 0 or (best.claimed < ENOUGH * total and not forced):
        return Detection(None, None, best.claimed, total)
    tied = [score for score in ranked if score.claimed == best.claimed]
    marks = {score: (_named_in(metadata, score.family), evidence(score) if len(tied) > 1 else 0) for score in tied}
    tied.sort(key=lambda score: marks[score], reverse=True)  # stable: else the order of the tables
    winner = tied[0]
    alike = tuple(score.family for score in tied[1:] if marks[score] == marks[winner] and score.family != winner.family)
    other = next((s for s in ranked if s != winner and s.claimed), None)
    runner_up = (other.family, other.format, other.claimed) if other else None
    return Detection(winner.family, winner.format, winner.claimed, total, runner_up, alike)


def _named_in(metadata: Mapping[str, str], family: str) -> bool:
    """Whether the metadata says this family (`modelspec.architecture`, `ss_base_model_version`)."""
    values = (metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", ""))
    marks = families()[family].architectures
    return any(value.lower().removesuffix("/lora").startswith(marks) for value in values if value)


def _score_mark(mark: Mark, columns: int, kernel: tuple[int, ...] | None) -> int:
    """+1 where a shape is as the mark says, -1 where it is not, 0 where it does not tell."""
    if mark.columns is not None:
        return 1 if columns == mark.columns else -1
    return 0 if kernel is None else (1 if kernel == mark.kernel else -1)


def _sum_marks(family: ModelFamily, shapes: Iterable[tuple[Slot, int, tuple[int, ...] | None]]) -> int:
    """Marks that hold minus marks that do not, each mark counted once by the first module that shows it."""
    seen: dict[Mark, int] = {}
    for slot, columns, kernel in shapes:
        for mark in family.marks:
            if mark.component == slot.component and slot.target.module.endswith(mark.suffix):
                seen.setdefault(mark, _score_mark(mark, columns, kernel))
    return sum(seen.values())


def _adapter_shapes(infos: Mapping[str, TensorInfo]) -> Callable[[_Score], int]:
    """A function from a score to its marks, over the facts of every stem (worked out only when there is a tie)."""

    def evidence(score: _Score) -> int:
        keys = compile_keys(score.family, score.format or "")
        found = ((slot, *facts) for stem, facts in _stem_facts(infos).items() if (slot := keys.slot(stem)) is not None)
        return _sum_marks(families()[score.family], found)

    return evidence


def _stem_facts(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    groups: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for name, info in infos.items():
        if (found := split_suffix(name)) is not None:
            for algorithm, role in found[2]:
                groups.setdefault(found[0], {}).setdefault(algorithm, {})[role] = info.shape
    facts: dict[str, tuple[int, tuple[int, ...] | None]] = {}
    for stem, by_algorithm in groups.items():
        for algorithm, shapes in by_algorithm.items():
            kind = algorithms()[algorithm]
            given = {role: shape for role, shape in shapes.items() if role != "alpha"}
            if frozenset(given) not in kind.forms:
                continue
            try:
                said = kind.facts(given)
            except ShapeMismatch:
                continue
            facts[stem] = (said.columns, said.kernel)
    return facts


def _checkpoint_marks(infos: Mapping[str, TensorInfo], score: _Score) -> int:
    keys = compile_checkpoint(score.family)
    shapes = ((place.slot, info.shape) for name, info in infos.items() if (place := keys.parse(name)) is not None)
    matrices = (
        (slot, shape[1] if len(shape) > 1 else 0, shape[2:]) for slot, shape in shapes if slot.param == "weight"
    )
    return _sum_marks(families()[score.family], matrices)
