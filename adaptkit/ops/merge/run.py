"""merge: bake adapters into a checkpoint, streaming; what no adapter touches is copied as bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit import engine
from adaptkit.ops.merge.kernel import Blender, Merged
from adaptkit.ops.merge.output import opened
from adaptkit.ops.merge.plan import Options, Plan
from adaptkit.ops.merge.provenance import Provenance
from adaptkit.ops.merge.report import Report, report_of
from adaptkit.ops.merge.steps import JointMerge, combined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from adaptkit.ops.merge.output import Output
    from adaptkit.ops.merge.verify import Verified
    from adaptkit.ops.shared import (
        Progress,
    )

__all__ = ["Options", "Plan", "run"]


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Merge and write; the only part that reads weights."""
    return run_together([plan], progress)[0]


def run_together(plans: Sequence[Plan], progress: Progress | None = None) -> list[Report]:
    """Several merges into one base, which is read once for as many outputs as fit in memory; each is as `run` makes it.

    The seconds of a report are its share. An error of one ends all, and none of those under way appears.
    """
    return [report for group in _groups(plans) for report in _run(group, progress)]


def _groups(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """As many at once as the largest tensor of the base leaves room for."""
    held: list[Plan] = []
    for plan in plans:
        more = [*held, plan]
        room = engine.bound(plan.steps, plan.options.memory)
        if held and max(step.bytes for step in combined(more)) > room:
            yield held
            more = [plan]
        held = more
    yield held


def _run(plans: Sequence[Plan], progress: Progress | None) -> list[Report]:
    started = time.perf_counter()
    options = plans[0].options
    found: list[dict[str, Merged]] = [{} for _ in plans]
    steps = combined(plans)
    with ExitStack() as last, ExitStack() as stack:
        hashes: dict[Path, str] = {}
        outputs = [stack.enter_context(_output(plan, hashes)) for plan in plans]
        blender = Blender(plans, outputs)
        copying = _Background(lambda: _copy_untouched(plans, outputs))
        last.callback(copying.join)  # after the outputs are given up, which ends it

        def store(joint: JointMerge, results: Sequence[Merged | None]) -> None:
            for merge, result, output, records in zip(
                joint.merges, results, outputs, found, strict=True
            ):
                if merge is not None and result is not None:
                    if result.tensor is not None:
                        output.put(merge.name, result.tensor)
                    if merge.scale is not None and result.scale is not None:
                        output.put(merge.scale, result.scale)
                    records[merge.name] = replace(result, tensor=None, scale=None)

        resources = engine.Resources.choose(options.device, options.memory)
        told = None if progress is None else lambda done: progress(done, len(steps))
        engine.run(
            steps, engine.Work(blender.load, blender.blend, store, held=_held), resources, told
        )
        copying.wait()
        for plan in plans:
            if not plan.options.verify:
                plan.close()  # on Windows a file that is open cannot be replaced
        with ThreadPoolExecutor(
            len(plans)
        ) as disk:  # each waits for the disk, which takes them all at once
            verified = list(disk.map(_finished, plans, outputs))
    seconds = (time.perf_counter() - started) / len(plans)
    return [report_of(*each, seconds) for each in zip(plans, found, verified, strict=True)]


def _output(plan: Plan, hashes: dict[Path, str]) -> AbstractContextManager[Output]:
    records = Provenance(plan, hashes)
    options = plan.options
    return opened(
        plan.layout,
        plan.output,
        records.metadata,
        overwrite=options.overwrite,
        hidden=options.verify,
    )


def _finished(plan: Plan, output: Output) -> Verified | None:
    from adaptkit.ops.merge.verify import verify

    output.finish()
    if not plan.options.verify:
        return None
    found = verify(plan, output.at)
    plan.close()
    return found


def _held(results: Sequence[Merged | None]) -> int:
    return sum(
        result.tensor.nbytes
        for result in results
        if result is not None and result.tensor is not None
    )


class _Background:
    """Work on a thread of its own: copying is the system's, and torch is imported meanwhile."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._failure = work, []  # type: tuple[Callable[[], None], list[BaseException]]
        self._thread = threading.Thread(target=self._body, name="adaptkit-copy", daemon=True)
        self._thread.start()

    def _body(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure.append(error)

    def join(self) -> None:
        """Wait for its end, whichever it takes."""
        self._thread.join()

    def wait(self) -> None:
        """Wait for it; its error is raised here."""
        self.join()
        if self._failure:
            raise self._failure[0]


def _copy_untouched(plans: Sequence[Plan], outputs: Sequence[Output]) -> None:
    for plan, output in zip(plans, outputs, strict=True):
        made = {name for merge in plan.computed for name in merge.writes()}
        output.copy(plan.base.source, [spec.name for spec in plan.specs if spec.name not in made])
