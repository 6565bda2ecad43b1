"""Modules that stand out of their kind within one file.

Each figure of a module is compared with those of the modules of the same kind (`q`, `ff`, …) and
part. The score is the modified z-score of Iglewicz and Hoaglin (1993), of logarithms:
0.6745 · (x − median) / MAD. It says that a module differs, not why.
"""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from adaptkit.ops.inspect.stats import Measured

__all__ = ["FIGURES", "Outlier", "outliers"]

# MAD of a normal distribution, in standard deviations
_NORMAL = 0.6745
# Iglewicz and Hoaglin mark 3.5; the kinds of real adapters have heavier tails
SCORE = 5.0
# modules of a kind: the median of fewer says little
LEAST = 8
# the least MAD, where all others are alike: a strength stands out from about 4 times the median on,
# a share from its half on, as a share of few parts cannot fall far
ALIKE, ALIKE_SHARES = math.log(1.2), math.log(1.1)


class Figure(NamedTuple):
    """A positive number of a module, and whether a large one may stand out as a small one does.

    `alike` is the least MAD of its logarithms.
    """

    value: Callable[[Measured], float | None]
    both: bool
    alike: float


class Outlier(NamedTuple):
    """A figure of a module, the median of its kind, and the score."""

    module: str
    component: str
    kind: str
    figure: str
    value: float
    median: float
    score: float


def _strength(one: Measured) -> float | None:
    """Root mean square of the numbers of ΔW: comparable where layers differ in size."""
    size = math.prod(one.shape)
    return one.norm / math.sqrt(size) if one.norm and size else None


def _outputs(one: Measured) -> float | None:
    """The share of the outputs that hold ΔW, between 1 / rows and 1."""
    return one.outputs / one.shape[0] if one.outputs and one.shape[0] else None


def _rank(one: Measured) -> float | None:
    """The share of the rank that is used: stable rank / rank."""
    return one.stable_rank / len(one.sigma) if one.stable_rank else None


FIGURES: Mapping[str, Figure] = {
    "strength": Figure(_strength, both=True, alike=ALIKE),
    "outputs": Figure(_outputs, both=False, alike=ALIKE_SHARES),
    "rank": Figure(_rank, both=False, alike=ALIKE_SHARES),
}


def outliers(measured: Sequence[Measured]) -> list[Outlier]:
    """The modules that stand out, the largest score first.

    Modules without a figure (ΔW of 0, NaN, or dependent on the base) have problems of their own.
    """
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for one in measured:
        groups[one.component, one.kind].append(one)
    found = [
        outlier
        for group in groups.values()
        for name, figure in FIGURES.items()
        for outlier in _of_kind(group, name, figure)
    ]
    return sorted(found, key=lambda outlier: -abs(outlier.score))


def _of_kind(group: Sequence[Measured], name: str, figure: Figure) -> Iterator[Outlier]:
    values = [(one, value) for one in group if (value := figure.value(one))]
    if len(values) < LEAST:
        return
    logs = [math.log(value) for _, value in values]
    middle = median(logs)
    spread = max(median(abs(log - middle) for log in logs), figure.alike)
    for (one, value), log in zip(values, logs, strict=True):
        score = _NORMAL * (log - middle) / spread
        if score < -SCORE or (figure.both and score > SCORE):
            place = (one.module, one.component, one.kind)
            yield Outlier(*place, name, value, math.exp(middle), score)
