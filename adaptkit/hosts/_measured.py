"""What the loaders did: the tables in `measured/`, written by `python -m tests.interop.hosts`.

A table says of every name of every family in every format whether a host loads a plain LoRA there.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.hosts.contract import Piece

__all__ = ["FOLDER", "Measurement", "measured_with", "measurement", "reads"]

FOLDER = Path(__file__).with_name("measured")


class Measurement(NamedTuple):
    """The table of one host: names by family, format, component and naming.

    True stands for all names of a naming, False for none, a list for the names that are not loaded.
    `version` is that of the loader, `date` when it was run or read, `how` which of the two.
    """

    version: str
    date: str
    how: str
    names: Mapping[str, Mapping[str, Mapping[str, Mapping[str, bool | list[str]]]]]


@cache
def measurement(host: str) -> Measurement:
    """The table of a host (cached); an empty one where there is none."""
    for folder in import_module(__package__).__path__:  # that of a host is beside its file
        path = Path(folder, "measured", f"{host}.json")
        if path.is_file():
            return Measurement(**json.loads(path.read_text(encoding="utf-8")))
    return Measurement("", "", "", {})


def measured_with(host: str) -> str:
    """The version of a loader that was run, or the month of the code that was read."""
    found = measurement(host)
    return found.version if found.how == "run" else f"of {found.date}"


def reads(table: Mapping[str, Mapping[str, bool | list[str]]] | None, piece: Piece) -> bool | None:
    """Whether a host finds a module under its name; None: not measured.

    `table` is that of the file's family and format.
    """
    found = (table or {}).get(piece.slot.component, {})
    outcomes = [
        outcome if isinstance(outcome, bool) else name not in outcome
        for naming, name in piece.names
        if (outcome := found.get(naming)) is not None
    ]
    # the same key under two namings is one key: found once, it is found
    return any(outcomes) if outcomes else None
