"""What is printed as peak memory is what is taken, within 15 %; all verbs, kinds and sizes: `python -m tests.ops.peaks`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ops import peaks
from tests.synth import FIXTURES

CHEAP = [
    "extract lora", "extract lokr", "extract full", "extract energy", "merge lora", "merge lokr",
    "merge dora", "merge boft", "merge glora", "merge full", "combine lora lokr",
    "compare lora lokr", "convert lora full", "resize full",
]  # fmt: skip


@pytest.mark.skipif(not peaks.available(), reason="only Linux tells a peak and forgets it")
def test_peak_memory_is_as_planned() -> None:
    """In a process of its own, whose C library gives back what is freed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.peaks", "small", *CHEAP],
        check=False, cwd=FIXTURES.parent, capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(CHEAP)
