"""Progress on stderr: a line for every stage, with amount, rate and time left."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from adaptkit.cli.show.page import console
from adaptkit.cli.show.text import human

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from adaptkit.ops.stages import Progress

__all__ = ["shown"]

SECONDS = 10.0  # between lines off a terminal
BYTES = "bytes"
_HOUR = 3600


@contextmanager
def shown(what: str) -> Iterator[Progress]:
    """Show the stages: a bar for each on a terminal, else a plain line every ten seconds."""
    if not sys.stderr.isatty():
        lines = _Lines(what)
        lines.start()
        try:
            yield lines
        finally:
            lines.stop()
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """Drawn again and again: the time left moves while a long step runs."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["stage"].told(time.monotonic()))

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), Amount())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        yield _OnTerminal(bars)


@dataclass
class _Stage:
    """One stage: how far it is, and since when."""

    name: str
    began: float
    done: int = 0
    total: int = 0
    unit: str = ""
    ended: float | None = None

    def told(self, now: float) -> str:
        """`2.1 GB of 6.9 GB, 450 MB/s, 0:11 left`."""
        elapsed = max((self.ended or now) - self.began, 1e-9)
        rate = self.done / elapsed
        # a rate of few things in a moment says nothing
        if not self.done or (self.unit != BYTES and elapsed < 1):
            return self.amount
        left = (self.total - self.done) / rate
        return ", ".join((self.amount, self._rate(rate), *([f"{_clock(left)} left"] * (left > 0))))

    @property
    def amount(self) -> str:
        """`2.1 GB of 6.9 GB`, or `12 of 354 modules`."""
        if self.unit == BYTES:
            return f"{human(self.done)} of {human(self.total)}"
        return f"{self.done} of {self.total} {self.unit}"

    def _rate(self, rate: float) -> str:
        if self.unit == BYTES:
            return f"{human(int(rate))}/s"
        return f"{rate:.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, _HOUR)
    clock = f"{rest // 60:02}:{rest % 60:02}"
    return f"{hours}:{clock}" if hours else clock.removeprefix("0")


class _Stages:
    """The stages so far. One that comes again, or starts over, is another pass."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: _Stage | None = None
        self.passes: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        with self.lock:
            new = self.now is None or self.now.name != stage or done < self.now.done
            if new:
                if self.now is not None:
                    self.now.ended = time.monotonic()
                self.now = _Stage(stage, time.monotonic())
                self.passes[stage] = self.passes.get(stage, 0) + 1
            assert self.now is not None
            self.now.done, self.now.total, self.now.unit = done, total, unit
            if done == total:
                self.now.ended = time.monotonic()
            self.update(self.now, new=new)

    def title(self, stage: str) -> str:
        """The name of a stage; from the second pass on with its number."""
        number = self.passes[stage]
        return stage if number == 1 else f"{stage}, pass {number}"

    def update(self, stage: _Stage, *, new: bool) -> None:
        """Show it."""
        raise NotImplementedError


class _OnTerminal(_Stages):
    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self.bars = bars
        self.task: TaskID | None = None

    def update(self, stage: _Stage, *, new: bool) -> None:
        if new or self.task is None:
            title = self.title(stage.name)
            self.task = self.bars.add_task(title, total=stage.total, stage=stage)
        self.bars.update(self.task, completed=stage.done, total=stage.total)


class _Lines(_Stages):
    """A thread says a line every ten seconds, also while nothing gets done."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._body, name="adaptkit-lines", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def update(self, stage: _Stage, *, new: bool) -> None:
        """The thread looks at `now`."""

    def _body(self) -> None:
        while not self.ended.wait(SECONDS):
            with self.lock:
                now = self.now
                said = (
                    f"{self.what}: begins"
                    if now is None
                    else f"{self.title(now.name)}: {now.told(time.monotonic())}"
                )
            click.echo(said, err=True)
