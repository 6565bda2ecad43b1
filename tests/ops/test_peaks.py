"""What is printed as peak memory is what is taken, within 15 %; all verbs, kinds and sizes: `python -m tests.ops.peaks`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adaptkit.algorithms import _stored
from adaptkit.linalg import lowrank, precision
from adaptkit.ops.difference import working
from tests.ops import peaks
from tests.synth import FIXTURES

CHEAP = [
    "extract lora", "extract exact", "extract lokr", "extract full", "extract energy",
    "merge lora", "merge lokr", "merge dora", "merge oft", "merge boft", "merge glora", "merge full",
    "merge hra", "merge miss-bat", "merge peft-oft", "merge lora fp8", "merge oft verify",
    "combine lora lokr", "combine ties", "compare lora lokr", "compare oft tuned",
    "convert lora full", "convert oft full", "resize full", "resize dora base",
    "extract lora nf4", "merge lora int8", "merge fourierft", "convert loha lora",
    "resize lokr", "convert lokr fp16", "convert lokr-factored fp16", "combine lora lora",
    "compare lokr-factored", "convert full lora", "convert lokr lora", "convert dora lora", "convert pissa lora",
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


def test_plans_know_the_sizes_that_kernels_work_with() -> None:
    """A plan loads no torch, and so cannot ask them."""
    assert (working.SMALL, _stored.SCRATCH) == (lowrank.SMALL, precision.SCRATCH)
