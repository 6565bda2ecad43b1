"""One loop over seeds for readers and verbs: each seed is one execution, which can be repeated."""

from __future__ import annotations

import random
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptkit.errors import AdaptkitError
from tests.fuzz.readers import TARGETS, Readers
from tests.fuzz.settings import Settings
from tests.fuzz.whole import OPTIONS, Bench

VERBS = ("inspect", *OPTIONS)
# PEFT makes the files whose settings are changed
SETTINGS = ("settings",) if find_spec("peft") else ()
NAMES = (*TARGETS, *VERBS, *SETTINGS)
SLOW = 10.0  # seconds of one execution: only what hangs takes as long


@dataclass
class Told:
    """What the executions of one target were."""

    name: str
    executions: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    # place and message of what no execution may end in, with the first seed
    found: dict[str, str] = field(default_factory=dict)


def fuzz(name: str, executions: int, seed: int = 0, until: float | None = None) -> Told:
    """Execute a target with this many seeds, or until a time."""
    told, began = Told(name), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kind = Readers if name in TARGETS else Settings if name in SETTINGS else Bench
        runner: Any = kind(Path(folder))
        for number in range(executions):
            if until is not None and time.monotonic() > until:
                break
            key = f"{name}-{seed}-{number}"
            start = time.monotonic()
            try:
                told.ends[runner.once(name, random.Random(key))] += 1
            except Exception as error:
                told.found.setdefault(_place(error), key)
            took = time.monotonic() - start
            if took > SLOW:
                told.found.setdefault(f"slower than {SLOW:.0f} s", key)
            told.slowest = max(told.slowest, took)
            told.executions += 1
    told.seconds = time.monotonic() - began
    return told


def _place(error: Exception) -> str:
    """Where an exception comes from, and what it says."""
    root = error.__cause__ if isinstance(error, AdaptkitError) and error.__cause__ else error
    frames = [f for f in traceback.extract_tb(root.__traceback__) if "/adaptkit/" in f.filename]
    where = f" {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(root).__name__}{where}: {str(root)[:160]}"
