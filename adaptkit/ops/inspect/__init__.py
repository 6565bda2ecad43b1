"""inspect: identify a file, or all of a folder."""

from __future__ import annotations

from adaptkit.ops.finding import expand, found_in
from adaptkit.ops.inspect.card import card
from adaptkit.ops.inspect.folder import FIELDS, SORTS, ordered, shortened, stream, survey, where
from adaptkit.ops.inspect.run import Options, Report, run

__all__ = [
    "FIELDS",
    "SORTS",
    "Options",
    "Report",
    "card",
    "expand",
    "found_in",
    "ordered",
    "run",
    "shortened",
    "stream",
    "survey",
    "where",
]
