"""What random numbers would keep: a module that keeps no more holds rounding, and nothing else."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["is_random"]

# smaller matrices fluctuate, and of a rank that holds most of any matrix nothing follows
SMALLEST, MOST = 32, 0.5
MARGIN = 1.03
_STEPS = 2000


def is_random(rows: int, columns: int, rank: int, kept: float) -> bool:
    """Whether a rank keeps no larger share of ‖Δ‖² than it would of independent entries."""
    if min(rows, columns) < SMALLEST:
        return False
    share = random_share(rows, columns, rank)
    return share < MOST and kept <= MARGIN * share


@lru_cache(maxsize=1024)
def random_share(rows: int, columns: int, rank: int) -> float:
    """The share of ‖·‖² in the largest `rank` singular values of a matrix of independent entries.

    By the law of Marchenko and Pastur (1967), integrated from its upper edge.
    """
    short, long = min(rows, columns), max(rows, columns)
    ratio = short / long
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    width = (high - low) / _STEPS
    wanted, mass, energy = min(1.0, rank / short), 0.0, 0.0
    for step in range(_STEPS):
        if mass >= wanted:
            break
        value = high - (step + 0.5) * width
        density = math.sqrt((high - value) * (value - low)) / (2 * math.pi * ratio * value)
        part = min(density * width, wanted - mass)
        mass += part
        energy += part * value
    return min(1.0, energy)
