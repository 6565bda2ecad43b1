"""Spectra of the lists of blocks: σᵢ/σ₁ as a median and the band of 80 % of the layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.heat_map import grouped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from adaptkit.ops.inspect import Report

__all__ = ["LONG", "Spectra", "counted", "groups"]

# least σ/σ₁ drawn, greatest number of spectra, longest spectrum on a linear axis
FLOOR, MANY, LONG = 1e-6, 8, 64


def groups(report: Report) -> dict[str, list[Sequence[float]]]:
    """Return the spectra of the strongest `MANY` lists of blocks, in the order of the model."""
    lists = {
        b["block"]: name
        for name, members in grouped(report.record["blocks"]).items()
        for b in members
    }
    found: dict[str, list[Sequence[float]]] = {name: [] for name in dict.fromkeys(lists.values())}
    for module, sigma in zip(report.modules, report.spectra, strict=True):
        if sigma and sigma[0] > 0:
            found[lists[module["block"]]].append(sigma)
    energy = {
        name: sum(value * value for sigma in spectra for value in sigma)
        for name, spectra in found.items()
    }
    strongest = sorted((name for name in found if found[name]), key=lambda name: -energy[name])[
        :MANY
    ]
    return {name: spectra for name, spectra in found.items() if name in strongest}


class Spectra:
    """The bands of lists of blocks, (3, r) each, and the limits that hold all of them.

    A band is the 10th, 50th and 90th percentile of σᵢ/σ₁. `least` is a power of ten below every
    median, `longest` the greatest number of singular values.
    """

    def __init__(self, groups: Mapping[str, Sequence[Sequence[float]]]) -> None:
        self.bands = {name: _band(spectra) for name, spectra in groups.items()}
        self.longest = max(band.shape[1] for band in self.bands.values())
        medians = [float(v) for band in self.bands.values() for v in band[1] if v > FLOOR]
        self.least = 10.0 ** math.floor(math.log10(min(medians) / 2))

    def shown(self, name: str) -> NDArray[Any]:
        """The band without what lies below `least`, as (3, k)."""
        band = self.bands[name]
        return band[:, band[2] > self.least]


def _band(spectra: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Return the 10th, 50th and 90th percentile of σᵢ/σ₁, (3, r); 0 beyond a layer's rank."""
    import numpy as np

    found = np.zeros((len(spectra), max(map(len, spectra))))
    for row, sigma in zip(found, spectra, strict=True):
        row[: len(sigma)] = np.asarray(sigma) / sigma[0]
    return np.quantile(found, (0.1, 0.5, 0.9), axis=0)


def counted(longest: int) -> list[int]:
    """Return 1 and round numbers up to the longest."""
    step = max(1, 2 ** math.ceil(math.log2(longest / 8)))
    return [1, *range(max(2, step), longest + 1, step)]
