"""Cells where adaptkit is wrong today. An entry goes as soon as its example passes: the strict
xfail turns red.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """What is known of a fault: why, how its problems read, and one cell that shows it."""

    reason: str
    problem: str  # a regular expression over the problems of a cell
    example: str  # the id of a cell


LOST = "^what is lost is not counted"
NAMELESS = "^the message names no file or tensor: "
USELESS = "^the hint (does not help|names what was given): "

# pattern over the ids of cells -> what is wrong there
KNOWN: dict[str, Fault] = {}


def explained(cell: str, problem: str) -> Fault | None:
    """The known fault that a problem of a cell is."""
    for pattern, fault in KNOWN.items():
        if re.search(pattern, cell) and re.search(fault.problem, problem):
            return fault
    return None
