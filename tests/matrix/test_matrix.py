"""Verb × algorithm × stored form × format × dtype × alpha × bias × layout × family: two outcomes
are accepted.

Either the result is what a reader of the file finds, measured = reported and within the promise; or
a refusal: exit 1, nothing written, a message that names what it is about, and hints that work.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cells import every
from tests.matrix.known import KNOWN, Fault, explained
from tests.matrix.verbs import Cell, play


@pytest.mark.matrix
def test_cell(cell: Cell, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    verdict = play(cell, tmp_path)
    record_property("refused", verdict.refused)
    record_property("hints", verdict.hints)
    new = [problem for problem in verdict.problems if not explained(cell.id, problem)]
    outcome = "mismatch" if new else "known" if verdict.problems else "held"
    record_property("matrix", outcome)
    assert not new, "\n".join(new)
    if verdict.problems:
        fault = explained(cell.id, verdict.problems[0])
        assert fault is not None
        pytest.xfail(fault.reason)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault, id=fault.example, marks=pytest.mark.xfail(strict=True, reason=fault.reason)
        )
        for fault in KNOWN.values()
    ],
)
def test_known_fault(fault: Fault, tmp_path: Path) -> None:
    """Red once the fault is mended: its entry in KNOWN goes then, and all its cells must hold."""
    (cell,) = (cell for cell in every() if cell.id == fault.example)
    verdict = play(cell, tmp_path)
    assert not any(explained(cell.id, problem) is fault for problem in verdict.problems)
