"""Progress of a verb: its stages, what is counted in each, and what the log says of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator

__all__ = ["STAGES", "Progress", "Tally", "counting", "log", "logged"]

# called with (stage, done, total, unit), from any thread; a stage begins with 0 done
Progress: TypeAlias = Callable[[str, int, int, str], None]

# every stage: what is done in it
STAGES = {
    "planning": "headers are read",
    "reading": "layers are sampled, or files and modules looked at",
    "fitting": "every module is computed",
    "choosing": "ranks are chosen",
    "refitting": "a second pass: modules are fitted again at the ranks chosen",
    "cutting": "a second pass: modules are cut to the ranks chosen",
    "merging": "weights are read, changed and written",
    "copying": "files that do not change are copied",
    "writing": "the output is written",
    "syncing": "the disk takes what was written",
    "verifying": "the output is read back and compared",
    "comparing": "modules are compared",
    "measuring": "differences are measured",
    "converting": "one input after the other is converted",
    "resizing": "one input after the other is resized",
    "running": "the jobs of a recipe run",
}


def counting(
    progress: Progress | None, stage: str, total: int, unit: str
) -> Callable[[int], None] | None:
    """A function of what is done in a stage, which begins now; None without `progress`."""
    if progress is None or not total:
        return None
    progress(stage, 0, total, unit)
    return lambda done: progress(stage, done, total, unit)


class Tally:
    """A stage to which several threads add."""

    def __init__(self, progress: Progress | None, stage: str, total: int, unit: str) -> None:
        self._tell = counting(progress, stage, total, unit)
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        """Count more."""
        if self._tell is None:
            return
        # told under the lock: the numbers never fall
        with self._lock:
            self._done += count
            self._tell(self._done)


def log() -> logging.Logger:
    """The logger `adaptkit`."""
    import logging

    return logging.getLogger("adaptkit")


@contextmanager
def logged(name: str, progress: Progress | None) -> Iterator[Progress]:
    """Log at INFO when a verb begins and ends, and each of its stages; forward its progress."""
    said = _Stages(name, progress)
    said.log.info("%s: begins", name)
    yield said
    said.ended()
    said.log.info("%s: done in %.1f s", name, time.perf_counter() - said.began)


class _Stages:
    def __init__(self, name: str, progress: Progress | None) -> None:
        self.name, self.progress, self.log = name, progress, log()
        self.began = self.since = time.perf_counter()
        self.last: tuple[str, int, int, str] | None = None

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        if self.last is None or self.last[0] != stage:
            self.ended()
            self.since = time.perf_counter()
            self.log.info("%s: %s, %d %s", self.name, stage, total, unit)
        self.last = stage, done, total, unit
        if self.progress is not None:
            self.progress(stage, done, total, unit)

    def ended(self) -> None:
        """Say how far the last stage got."""
        if self.last is not None:
            stage, done, total, unit = self.last
            seconds = time.perf_counter() - self.since
            counts = (self.name, stage, done, total, unit, seconds)
            self.log.info("%s: %s, %d of %d %s in %.1f s", *counts)
