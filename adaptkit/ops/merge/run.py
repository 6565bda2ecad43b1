"""merge: stream a checkpoint and add adapters; copy unchanged tensors byte for byte."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from adaptkit import engine
from adaptkit.files.header import nbytes
from adaptkit.ops.merge.kernel import Blender, Merged, held
from adaptkit.ops.merge.output import opened
from adaptkit.ops.merge.plan import Options, Plan
from adaptkit.ops.merge.provenance import Provenance
from adaptkit.ops.merge.report import Report, report_of
from adaptkit.ops.merge.steps import JointMerge, combined
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from adaptkit.ops.merge.output import Output
    from adaptkit.ops.merge.verify import Verified
    from adaptkit.ops.stages import Progress

__all__ = ["Options", "Plan", "run"]


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Read the weights, merge and write."""
    return run_together([plan], progress)[0]


def run_together(plans: Sequence[Plan], progress: Progress | None = None) -> list[Report]:
    """Run several merges into one base, with the same results as `run`.

    The base is read once for as many outputs as fit into memory. Each report has its share of the
    seconds. An error ends all merges, and no unfinished output appears.
    """
    return [report for group in _groups(plans) for report in _run(group, progress)]


def _groups(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """Group the plans so that the steps of a group fit into memory."""
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
    resources = engine.Resources.choose(
        options.device, options.memory, gains=False, wide=any(map(_wide, plans))
    )
    steps = combined(plans, at_once=not resources.on_cpu)
    with ExitStack() as last, ExitStack() as stack:
        hashes: dict[Path, str] = {}
        outputs = [stack.enter_context(_output(plan, hashes, progress)) for plan in plans]
        tally = Tally(progress, "merging", sum(output.size for output in outputs), "bytes")
        for output in outputs:
            output.tell(tally.add)
        blender = Blender(plans, outputs, at_once=not resources.on_cpu)
        copying = _Background(lambda: _copy_untouched(plans, outputs))
        # after the outputs are aborted, which ends the copying
        last.callback(copying.join)

        def store(joint: JointMerge, results: Sequence[Merged | None]) -> None:
            copying.check()
            for merge, result, output, records in zip(
                joint.merges, results, outputs, found, strict=True
            ):
                if merge is not None and result is not None:
                    for name, tensor in result.written.items():
                        output.put(name, tensor)
                    records[merge.name] = replace(result, written={})

        work = engine.Work(blender.load, blender.blend, store, held=held)
        notes = engine.run(steps, work, resources)
        copying.wait()
        for plan in plans:
            if not plan.options.verify:
                # on Windows an open file cannot be replaced
                plan.close()
        # each output waits for the disk, which syncs them all at once
        with ThreadPoolExecutor(len(plans)) as disk:
            saved = Tally(progress, "syncing", len(plans), "outputs")
            list(disk.map(lambda output: _saved(output, saved), outputs))
            verified = _verified(plans, outputs, progress)
    seconds = (time.perf_counter() - started) / len(plans)
    reports = (report_of(*each, seconds) for each in zip(plans, found, verified, strict=True))
    return [replace(report, notes=(*report.notes, *notes)) for report in reports]


def _wide(plan: Plan) -> bool:
    """Whether a merge needs float64, or decompositions, as rotations do."""
    added = [
        (c.entry, plan.adapters[c.adapter].source.infos)
        for merge in plan.computed
        for c in merge.contributions
        if c.strength
    ]
    stored = (infos[key] for entry, infos in added for _, key in entry.tensors())
    weights = (plan.base.source.infos[merge.name] for merge in plan.computed)
    wide = "F64" in {merge.dtype for merge in plan.computed}
    wide |= any(info.dtype == "F64" for info in chain(stored, weights))
    return wide or any(not entry.kind.additive for entry, _ in added)


def _output(
    plan: Plan, hashes: dict[Path, str], progress: Progress | None
) -> AbstractContextManager[Output]:
    records = Provenance(plan, hashes)
    options = plan.options
    return opened(
        plan.layout,
        plan.output,
        records.metadata,
        overwrite=options.overwrite,
        hidden=options.verify,
        progress=progress,
    )


def _saved(output: Output, tally: Tally) -> None:
    output.finish()
    tally.add(1)


def _verified(
    plans: Sequence[Plan], outputs: Sequence[Output], progress: Progress | None
) -> list[Verified | None]:
    """Read back the outputs of the plans that ask for it."""
    from adaptkit.ops.merge.verify import verify

    asked = [plan for plan in plans if plan.options.verify]
    size = sum(nbytes(spec.dtype, spec.shape) for plan in asked for spec in plan.specs)
    tally = Tally(progress, "verifying", size, "bytes")
    found: list[Verified | None] = []
    for plan, output in zip(plans, outputs, strict=True):
        found.append(verify(plan, output.at, tally.add) if plan.options.verify else None)
        plan.close()
    return found


class _Background:
    """Work on a background thread: the system copies files while torch is imported."""

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
        """Wait for the end of the work, failed or not."""
        self._thread.join()

    def wait(self) -> None:
        """Wait for the end of the work and raise its error."""
        self.join()
        self.check()

    def check(self) -> None:
        """Raise its error, if it has failed by now."""
        if self._failure:
            raise self._failure[0]


def _copy_untouched(plans: Sequence[Plan], outputs: Sequence[Output]) -> None:
    for plan, output in zip(plans, outputs, strict=True):
        made = {name for merge in plan.computed for name in merge.writes()}
        output.copy(plan.kept, [spec.name for spec in plan.specs if spec.name not in made])
