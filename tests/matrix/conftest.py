"""The default run takes a seeded twentieth of the matrix, `pytest -m matrix` all of it; both end with
what they found.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.matrix import axes, cells


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files: what happens after a power cut is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def whole(config: pytest.Config) -> bool:
    """Whether all cells run."""
    return "matrix" in config.getoption("markexpr", "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ == "test_cell":
        taken = cells.every() if whole(metafunc.config) else cells.some()
        metafunc.parametrize("cell", taken, ids=[cell.id for cell in taken])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") != "call":
                continue
            said = dict(report.user_properties)
            if "matrix" in said:
                found["cells"] += 1
                found["refusals"] += bool(said["refused"])
                found["hints followed"] += said["hints"]
                found["mismatches"] += said["matrix"] == "mismatch"
                found["known faults"] += said["matrix"] == "known"
                refusals[said["refused"]] += 1
    if not found["cells"]:
        return
    share = "all" if whole(terminalreporter.config) else f"one in {axes.SHARE}"
    parts = ("cells", "refusals", "hints followed", "known faults", "mismatches")
    line = ", ".join(f"{found[part]} {part}" for part in parts)
    terminalreporter.write_line(f"matrix ({share}, seed {axes.SEED!r}): {line}")
    if whole(terminalreporter.config):
        for message, count in refusals.most_common(12):
            if message:
                terminalreporter.write_line(f"  refused {count:5}: {message}")
