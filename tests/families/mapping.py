"""Checks of a family's table against the mappings of ../shared/corpus, which came from running real converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptkit.keymap import Place, compile_checkpoint

Slice = tuple[str, int, int]


def read(corpus: Path, kind: str, name: str) -> dict[str, Any]:
    return json.loads((corpus / kind / f"{name}.json").read_text(encoding="utf-8"))


def place(family: str, key: str) -> Place:
    found = compile_checkpoint(family).parse(key)
    assert found is not None, f"{family} does not know {key}"
    return found


def check_pairs(
    family: str,
    component: str,
    mapping: dict[str, Any],
    prefix: str = "",
    sizes: dict[str, int] | None = None,
) -> int:
    """Every diffusers name and its original name(s) mean the same slot; how many were compared.

    `prefix` goes before the original keys; `sizes` are row counts of original keys that slices do not cover whole.
    """
    rows: dict[str, int] = dict(sizes or {})
    for value in mapping.values():
        for key, _, stop in value if isinstance(value, list) else ():
            rows[key] = max(rows.get(key, 0), stop)
    for ours, theirs in mapping.items():
        mine = place(family, f"{component}.{ours}")
        if isinstance(theirs, str):
            other = place(family, prefix + theirs)
            assert (other.slot, other.swapped, other.transposed) == (
                mine.slot,
                mine.swapped,
                False,
            ), ours
        elif isinstance(theirs, dict):
            other = place(family, prefix + theirs["key"])
            assert other.slot == mine.slot, ours
            assert (other.transposed, mine.transposed) == (True, False), ours
        else:
            check_slices(
                family,
                mine,
                [(prefix + key, start, stop) for key, start, stop in theirs],
                rows,
                prefix,
            )
    return len(mapping)


def check_slices(
    family: str, mine: Place, slices: list[Slice], rows: dict[str, int], prefix: str
) -> None:
    (key, start, stop), *rest = slices
    other = place(family, key)
    total = rows[key.removeprefix(prefix)]
    if not rest:
        assert (other.slot.target, other.slot.rows) == (mine.slot.target, None), key
        assert mine.slot.rows is not None, key
        assert mine.slot.rows.bounds(total) == (start, stop), key
    elif {name for name, _, _ in slices} == {key}:
        half = total // 2
        assert [(a, b) for _, a, b in slices] == [(half, total), (0, half)], key
        assert other.slot == mine.slot, key
        assert other.swapped != mine.swapped, key
    else:
        _check_joined(family, mine, slices)


def _check_joined(family: str, mine: Place, slices: list[Slice]) -> None:
    """diffusers has the fused module, the original its parts in order."""
    end = 0
    assert mine.slot.rows is None
    total = sum(stop - start for _, start, stop in slices)
    for key, start, stop in slices:
        other = place(family, key)
        assert other.slot.target == mine.slot.target, key
        assert other.slot.rows is not None, key
        assert other.slot.rows.bounds(total) == (end, end + stop - start), key
        end += stop - start


def check_known(family: str, keys: list[str]) -> int:
    """Every key is in the table; how many there were."""
    for key in keys:
        place(family, key)
    return len(keys)
