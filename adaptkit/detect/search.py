"""Detect family and format from a header, with evidence.

Every pair is scored, in no order. A family is named only if its names and its sizes fit the file.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.detect.beginnings import beginning_of, begun, checkpoint_heads, starts
from adaptkit.detect.evidence import SAMPLE, AdapterFile, CheckpointFile
from adaptkit.errors import NoSuchName
from adaptkit.files import provenance
from adaptkit.keymap import (
    compile_checkpoint,
    compile_keys,
    split_suffix,
    unwrapped,
    wrapper,
)
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

    from adaptkit.detect.evidence import File
    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.formats.contract import KeyFormat

__all__ = [
    "Detection",
    "Nearest",
    "chosen",
    "detect_adapter",
    "detect_checkpoint",
    "families",
    "formats",
    "is_adapter",
    "spelled_as_adapter",
]

# spellings of adapters in general: a kind adaptkit cannot read must not pass for a checkpoint
_FOREIGN = re.compile(
    r"lora|_lora\d?\.|lokr_|hada_|glora|oft_|boft_|dora_scale|ia3_|on_input$|magnitude"
    r"|\.alpha$|\.[ab][12]\.weight$"
)

# suffixes that checkpoints have too
_PLAIN = frozenset({"weight", "bias", "scale", "up.weight", "down.weight"})

KEPT = 8192  # tensors: the headers that are kept for the next file take 40 MB at most
FEW = 1 / 16  # share of a sample, far from ENOUGH of a file
ENOUGH = 0.5  # share of the keys; another family that shares a few names claims fewer


class Nearest(NamedTuple):
    """The family that fits best among those that do not fit.

    `names` and `sizes` are the shares that fit; None if no size in the file tells anything.
    """

    family: str
    names: float
    sizes: float | None

    def __str__(self) -> str:
        """Say it in words.

        >>> str(Nearest("flux", 0.887, 1.0))
        'the nearest is flux, which fits 88 % of the names and 100 % of the sizes'
        """
        known = "" if self.sizes is None else f" and {int(100 * self.sizes)} % of the sizes"
        names = f"{int(100 * self.names)} % of the names"
        return f"the nearest is {self.family}, which fits {names}{known}"


@dataclass(frozen=True)
class Detection:
    """The winner and the evidence: `claimed` of `total` keys, runner-up and equal look-alikes.

    `nearest` is set if no family fits. `wrapper` was taken away from the names before one did.
    """

    family: str | None
    format: str | None
    claimed: int
    total: int
    runner_up: tuple[str, str | None, int] | None = None
    alternatives: tuple[str, ...] = ()
    nearest: Nearest | None = None
    wrapper: str = ""


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
    adapters = others = 0
    for name in names:
        if spelled_as_adapter(name, gates):
            adapters += 1
        else:
            others += 1
        if 2 * max(adapters, others) > len(names):  # the rest changes nothing
            break
    return adapters > others


def spelled_as_adapter(name: str, gates: Set[str]) -> bool:
    """Whether a key is spelled as an adapter's.

    IA³ calls its vector `weight`, which means an adapter only together with an `on_input`. `gates`
    are the beginnings of the keys that have one.
    """
    found = split_suffix(name)
    if found is not None and found[1] in _PLAIN and _FOREIGN.search(name) is None:
        return f"{found[0]}." in gates
    return found is not None or _FOREIGN.search(name) is not None


def chosen(kind: str, known: Mapping[str, object], name: str | None) -> tuple[str, ...]:
    """The names to consider: all, or the given one.

    Case does not count. Raises `NoSuchName` if it is unknown.
    """
    if name is None:
        return tuple(known)
    found = {one.lower(): one for one in known}.get(name.strip().lower())
    if found is None:
        raise NoSuchName.among(kind, name, known)
    return (found,)


def detect_adapter(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    family: str | None = None,
    format: str | None = None,
) -> Detection:
    """Score every (family, format) by claimed keys, among those whose names and sizes fit.

    Ties are broken by metadata, then by shapes.

    `family` and `format` restrict the search. A winner must claim at least half of the keys. A
    given `family` need not fit. If none fits, names are tried without the prefixes of wrappers.
    """
    found = _detected(infos, metadata, family, format)
    if found.family is not None and (not family or 2 * found.claimed > found.total):
        return found
    for choice in range(2):
        plain, taken = _without_wrappers(infos, choice)
        again = _detected(plain, metadata, family, format) if taken else found
        if again.family is not None and again.claimed > found.claimed and _denoised(again, plain):
            return replace(again, wrapper=taken)
    return found


def _without_wrappers(
    infos: Mapping[str, TensorInfo], choice: int
) -> tuple[Mapping[str, TensorInfo], str]:
    """A file's keys without wrappers, and the first wrapper; `choice` of what each may be."""
    plain: dict[str, TensorInfo] = {}
    taken = ""
    for name, info in infos.items():
        found = split_suffix(name)
        choices = unwrapped(found[0]) if found else ()
        if found is None or len(choices) <= choice:
            plain[name] = info
            continue
        taken = taken or wrapper(found[0], choices[choice])
        # a suffix may stand for a parameter that the stem has and the key has not
        whole = name.startswith(f"{found[0]}.")
        bare = choices[choice] + name[len(found[0]) :] if whole else unwrapped(name)[choice]
        plain[bare] = info._replace(name=bare)
    return plain, taken


def _denoised(found: Detection, infos: Iterable[str]) -> bool:
    """Whether a file holds a denoiser; a language model's own adapters are wrapped alike."""
    keys = compile_keys(found.family or "", found.format or "")
    first = keys.family.components[0].name
    parsed = (keys.parse(name) for name in infos)
    return any(one is not None and one.slot.component == first for one in parsed)


def _detected(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    family: str | None,
    format: str | None,
) -> Detection:
    layout = tuple((name, info.dtype, info.shape) for name, info in infos.items())
    judged = scored if len(infos) <= KEPT else scored.__wrapped__
    ordered, file = judged(_Header(layout, infos), family, format)
    return _decide(ordered, len(infos), metadata, file, bool(family))


@dataclass(frozen=True)
class _Header:
    """The tensors of a file; equal to those of another file of the same names, kinds and sizes."""

    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    infos: Mapping[str, TensorInfo] = field(compare=False)


# one trainer's files in a folder are laid out alike; few are kept
@lru_cache(maxsize=8)
def scored(
    header: _Header, family: str | None, format: str | None
) -> tuple[list[_Score], AdapterFile]:
    """The scores of the families and formats worth it, in the order of the tables."""
    infos = header.infos
    stems = Counter(found[0] for name in infos if (found := split_suffix(name)) is not None)
    names = chosen("family", families(), family)
    pairs = [
        pair for kind in chosen("format", formats(), format) for pair in _likely(stems, kind, names)
    ]
    file = AdapterFile(infos, stems)
    scores: dict[_Pair, _Score] = {}
    first = second = 0  # the most keys that a fitting pair claims, and the next most
    for pair in sorted(pairs, key=lambda pair: -pair.most):
        # `most` bounds what a pair can claim, and pairs come in descending order of it
        if pair.most < second:
            break  # neither this pair nor a later one can be winner or runner-up
        if len(names) > 1 and pair.estimate() < max(ENOUGH / 2 * first, FEW * pair.total):
            continue
        scores[pair] = score = pair.score()
        if score.claimed > first and not (family or file.fit(score.family, score.format).good):
            continue
        first, second = max(first, score.claimed), max(second, min(first, score.claimed))
    # in the order of the tables, which breaks ties
    return [scores[pair] for pair in pairs if pair in scores], file


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


def _likely(stems: Mapping[str, int], format: str, names: Sequence[str]) -> Iterator[_Pair]:
    """The families worth scoring in a format, judged by a sample."""
    begins = starts(format)
    found = [stem for stem in stems if stem.startswith(begins)]
    if not found:
        return
    groups: dict[str, list[str]] = {}
    beginnings = list(map(beginning_of(format), found))
    for start, stem in zip(beginnings, found, strict=True):
        groups.setdefault(start, []).append(stem)
    like: dict[str, list[str]] = {}
    for start in groups:
        for name in begun(start, format):
            like.setdefault(name, []).append(start)
    every = max(1, len(found) // SAMPLE)
    sample, sampled = found[::every], Counter(beginnings[::every])
    total = sum(stems[stem] for stem in found)
    enough = ENOUGH / 2 * len(sample) if len(names) > 1 else 0
    # many families begin alike
    same: dict[tuple[str, ...], tuple[Mapping[str, int], int]] = {}
    for name in names:
        mine = tuple(like.get(name, ()))
        if mine not in same:
            near = {stem: stems[stem] for start in mine for stem in groups[start]}
            same[mine] = near, sum(near.values())
        if sum(map(sampled.__getitem__, mine)) >= enough:
            yield _Pair(name, format, *same[mine], sample, total)


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
    near = {name: sum(key.startswith(checkpoint_heads(name)) for key in sample) for name in names}
    counts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: -near[name]):
        # half of ENOUGH leaves room for an unrepresentative sample
        least = ENOUGH / 2 * max(counts.values(), default=1) * len(sample) / max(1, len(own))
        least = max(least, FEW * len(sample)) if len(names) > 1 else 0
        # most families are ruled out without compiling their tables
        if near[name] >= least:
            keys = compile_checkpoint(name)
            if sum(map(keys.claims, sample)) >= least:
                counts[name] = sum(map(keys.claims, infos))
    # in the order of the tables, which breaks ties
    scores = [_Score(counts[name], name, None) for name in names if name in counts]
    return _decide(scores, len(own), metadata, CheckpointFile(infos, own), bool(family))


def _decide(
    scores: list[_Score], total: int, metadata: Mapping[str, str], file: File, forced: bool
) -> Detection:
    ranked = sorted(scores, key=lambda score: -score.claimed)
    least = 0 if forced else ENOUGH * total
    enough = [score for score in ranked if score.claimed > least]
    fitting = (score for score in enough if forced or file.fit(score.family, score.format).good)
    best = next(fitting, None)
    if best is None:
        claimed = ranked[0].claimed if ranked else 0
        return Detection(None, None, claimed, total, nearest=_nearest(ranked, file))
    tied = [best, *(score for score in fitting if score.claimed == best.claimed)]
    marks = {score: _told(score, metadata, file) if len(tied) > 1 else () for score in tied}
    tied.sort(key=lambda score: marks[score], reverse=True)  # stable: table order breaks ties
    leaders = [score for score in tied if marks[score] == marks[tied[0]]]
    if len(leaders) > 1:
        # if shapes cannot decide, the family whose own trainers spell names so is likelier, and
        # then the one that `yields_to` names
        leaders = sorted(
            leaders, key=lambda s: (-file.spelled(s.family, s.format), _yields(s, leaders))
        )
    winner = leaders[0]
    alike = tuple(s.family for s in leaders[1:] if s.family != winner.family)
    other = next((s for s in ranked if s != winner and s.claimed), None)
    runner_up = (other.family, other.format, other.claimed) if other else None
    return Detection(winner.family, winner.format, winner.claimed, total, runner_up, alike)


def _told(score: _Score, metadata: Mapping[str, str], file: File) -> tuple[float, ...]:
    """What tells apart families that claim the same keys: metadata, sizes, complete runs."""
    fit = file.fit(score.family, score.format)
    return (
        # what adaptkit wrote down before it renamed the modules
        provenance.family(metadata) == score.family,
        _named_in(metadata, score.family),
        # a module without a mark fits as well as one whose mark holds
        1.0 if fit.marks is None else fit.marks,
        1.0 if fit.sizes is None else fit.sizes,
        file.runs(score.family, score.format),
    )


def _nearest(scores: Iterable[_Score], file: File) -> Nearest | None:
    """The family of which the most fits, names and sizes together."""
    fits = {score: file.fit(score.family, score.format) for score in scores}
    near = {
        score: (fit.names * (1 + (fit.sizes or 0)), score.claimed)
        for score, fit in fits.items()
        if fit.names >= ENOUGH / 2
    }
    leaders = [score for score, share in near.items() if share == max(near.values())]
    if not leaders:
        return None
    best = min(leaders, key=lambda score: _yields(score, leaders))
    return Nearest(best.family, fits[best].names, fits[best].sizes)


def _yields(score: _Score, tied: Sequence[_Score]) -> int:
    """How many of the tied families are likelier."""
    return len({other.family for other in tied} & set(families()[score.family].yields_to))


def _named_in(metadata: Mapping[str, str], family: str) -> bool:
    """Whether `modelspec.architecture` or `ss_base_model_version` names this family."""
    values = (metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", ""))
    marks = families()[family].architectures
    return any(value.lower().removesuffix("/lora").startswith(marks) for value in values if value)
