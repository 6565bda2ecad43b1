"""batch: the jobs of a recipe, each done once: what is done already is left, what fails is named, what was cut off goes on."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError, NoSuchName, WouldOverwrite, WrongUsage
from adaptkit.ops.batch.log import Ledger
from adaptkit.ops.batch.recipe import load
from adaptkit.ops.batch.workers import Engine, Here, Outcome, Processes, planned
from adaptkit.ops.verb import verb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.ops.batch.recipe import Job
    from adaptkit.ops.shared import Progress

__all__ = ["Options", "Plan", "Preview", "Report", "Result", "plan", "preview", "run"]

BUNDLE = 16  # outputs that are written at once
ENGINES = ("local", "ray")
CHANGED = "an input changed while it was read"


@dataclass(frozen=True)
class Options:
    """`jobs`: worker processes, 0 to work in this one; None: one, or on a Ray cluster as many as it has CPUs. `overwrite`:
    also replace outputs that this recipe did not write. `engine`: `local`, or `ray` with the cluster's `address`."""

    jobs: int | None = None
    keep_going: bool = False
    overwrite: bool = False
    engine: str = "local"
    address: str | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs of a recipe. `groups` holds them in the order they are done: those on one base follow one another, merges into
    it in one pass."""

    recipe: Path
    options: Options
    groups: tuple[tuple[Job, ...], ...]
    ledger: Ledger

    @property
    def jobs(self) -> tuple[Job, ...]:
        """In the order they are done."""
        return tuple(job for group in self.groups for job in group)


@dataclass(frozen=True)
class Result:
    """What became of one job: `status` is done, skipped (done before) or failed."""

    job: Job
    status: str
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def bytes(self) -> int:
        """Of its output, if it was written now."""
        return int(self.outcome.report.get("bytes", 0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {**_name(self.job), "status": self.status}
        if self.status == "done":
            found |= {**self.outcome.report, "seconds": round(self.outcome.seconds, 3)}
        if self.status == "failed":
            found |= {"error": self.outcome.error, "hint": self.outcome.hint}
        return found


@dataclass(frozen=True)
class Report:
    """What was done, in the recipe's order; `not_run`: jobs that were left when the first failure stopped the rest."""

    recipe: Path
    log: Path
    results: tuple[Result, ...]
    not_run: int
    seconds: float

    @property
    def failures(self) -> tuple[Result, ...]:
        """The jobs that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def count(self, status: str) -> int:
        """How many are done, skipped or failed."""
        return sum(result.status == status for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "recipe": str(self.recipe),
            "log": str(self.log),
            "jobs": len(self.results) + self.not_run,
            **{status: self.count(status) for status in ("done", "skipped", "failed")},
            "not_run": self.not_run,
            "bytes": sum(result.bytes for result in self.results),
            "seconds": round(self.seconds, 3),
            "failures": [result.to_dict() for result in self.failures],
            "details": [result.to_dict() for result in self.results],
        }


@dataclass(frozen=True)
class Preview:
    """What a run would do: the plan of each job that is not done yet, or why it would fail; sums over them.

    `peak_memory` is that of as many jobs at once as there are workers. `open_sizes`: jobs whose output's size is decided by
    the numbers, so that `bytes_out` holds only the part that is known.
    """

    recipe: Path
    jobs: int
    skipped: int
    plans: tuple[Mapping[str, Any], ...]
    failures: tuple[Result, ...]
    peak_memory: int

    def total(self, *names: str) -> int:
        """The sum over the jobs of the first of these figures that each has."""
        return sum(next((plan[name] for name in names if name in plan), 0) for plan in self.plans)

    @property
    def open_sizes(self) -> int:
        """Jobs of which only the copied part of the output is known."""
        return sum("bytes_out_copied" in plan and plan["peak_memory"] > 0 for plan in self.plans)

    @property
    def bytes_out(self) -> int:
        """What would be written, as far as it is known (an upper bound for extractions)."""
        return self.total("bytes_out", "bytes_out_at_most", "bytes_out_copied")

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """JSON-ready; `details`: with the records of all modules of all jobs."""
        return {
            "recipe": str(self.recipe),
            "jobs": self.jobs,
            "to_do": len(self.plans),
            "skipped": self.skipped,
            "failed": len(self.failures),
            "bytes_in": self.total("bytes_in"),
            "bytes_out": self.bytes_out,
            "open_sizes": self.open_sizes,
            "peak_memory": self.peak_memory,
            "failures": [result.to_dict() for result in self.failures],
            "plans": [
                {k: v for k, v in plan.items() if details or k != "details"} for plan in self.plans
            ],
        }


def _name(job: Job) -> dict[str, Any]:
    return {
        "job": job.number,
        "place": job.place,
        "command": job.command,
        "output": str(job.output),
    }


def plan(recipe: Path, options: Options) -> Plan:
    """Read the recipe and the log beside it; no input is opened."""
    if options.jobs is not None and options.jobs < 0:
        raise WrongUsage(f"--jobs must be at least 0, not {options.jobs}")
    if options.engine not in ENGINES:
        raise NoSuchName.among("engine", options.engine, ENGINES)
    ledger = Ledger(recipe)
    return Plan(recipe, options, _by_base(load(recipe, ledger.made())), ledger)


def _by_base(jobs: Iterable[Job]) -> tuple[tuple[Job, ...], ...]:
    """Jobs on the same base beside one another, the rest by themselves; otherwise in the recipe's order."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        base = next(
            (os.path.abspath(item.path) for item in job.inputs if item.role == "base"), None
        )
        groups.setdefault(job.number if base is None else base, []).append(job)
    return tuple(map(tuple, groups.values()))


def _together(job: Job) -> bool:
    """Whether it may be done in one pass with others on its base."""
    return verb(job.command).together is not None and not job.options.get("verify", False)


def preview(plan: Plan, progress: Progress | None = None) -> Preview:
    """Plan every job that is not done yet; nothing is written, and torch is not needed."""
    plan = replace(plan, ledger=Ledger(plan.recipe, keep=False))
    plans, failures, skipped = [], [], 0
    for n, job in enumerate(plan.jobs, 1):
        try:
            if plan.ledger.finished(job):
                skipped += 1
            else:
                plans.append({**_name(job), **_foreseen(_claimed(plan, job))})
        except AdaptkitError as error:
            failures.append(Result(job, "failed", Outcome(error=str(error), hint=error.hint)))
        if progress is not None:
            progress(n, len(plan.jobs))
    peak = sum(nlargest(plan.options.jobs or 1, (found["peak_memory"] for found in plans)))
    plans.sort(key=lambda found: found["job"])
    return Preview(plan.recipe, len(plan.jobs), skipped, tuple(plans), tuple(failures), peak)


def _foreseen(job: Job) -> dict[str, Any]:
    """The plan of one job. A folder that a run would create does not exist yet: it is planned in the one above."""
    folder = job.output.parent
    changed: dict[str, Any] = {}
    if not folder.exists():
        above = next((path for path in folder.parents if path.exists()), folder)
        changed = {"output": above / f"{os.urandom(8).hex()}-{job.output.name}"}
    with closing(planned(job, **changed)) as found:
        return {**found.to_dict(), "output": str(job.output)}


def _claimed(plan: Plan, job: Job) -> Job:
    """The job, allowed to replace its output where this recipe wrote it; WouldOverwrite where another did."""
    allowed = (
        plan.options.overwrite
        or job.options.get("overwrite", False)
        or plan.ledger.ours(job.output)
    )
    if job.output.exists() and not allowed:
        hint = "pass --overwrite to replace it, or change the output in the recipe"
        raise WouldOverwrite(
            "exists already, and this recipe did not write it", hint=hint, file=job.output
        )
    return replace(job, options={**job.options, "overwrite": allowed})


def run(
    plan: Plan,
    progress: Progress | None = None,
    tell: Callable[[Result], None] | None = None,
    engine: Engine | None = None,
) -> Report:
    """Do every job that is not done yet; `tell` gets each result when it is there.

    The first failure ends it unless `keep_going`; jobs that others are doing then are finished. An interrupt at any moment
    leaves a log from which the next run goes on.
    """
    started = time.perf_counter()
    found = _Run(plan, progress, tell)
    workers = engine or _engine(plan.options)
    with closing(
        workers.run(found.pending(workers.workers))
    ) as outcomes:  # at once, when the loop is left: workers must not live on
        for job, outcome in outcomes:
            found.ended(job, outcome)
    results = tuple(sorted(found.results, key=lambda result: result.job.number))
    return Report(
        plan.recipe,
        plan.ledger.log,
        results,
        len(plan.jobs) - len(results),
        time.perf_counter() - started,
    )


def _engine(options: Options) -> Engine:
    if options.engine == "ray":
        from adaptkit.ops.batch.ray_engine import Ray

        return Ray(options.jobs, options.address)
    return Here() if options.jobs == 0 else Processes(options.jobs or 1)


class _Key:
    """The key of a job, its inputs hashed `meanwhile`, while the job is done; at once where one is not there."""

    def __init__(self, ledger: Ledger, job: Job, *, meanwhile: bool) -> None:
        self._found: list[str | AdaptkitError] = []
        self._thread = threading.Thread(
            target=self._hash, args=(ledger, job), name="adaptkit-hash", daemon=True
        )
        self._thread.start()
        if not meanwhile:
            self.get()

    def _hash(self, ledger: Ledger, job: Job) -> None:
        try:
            self._found.append(ledger.key(job))
        except AdaptkitError as error:
            self._found.append(error)

    def get(self) -> str:
        """Wait for it; raises what an input that cannot be read raises."""
        self._thread.join()
        (found,) = self._found
        if isinstance(found, AdaptkitError):
            raise found
        return found


@dataclass
class _Run:
    """The state of a run: who reads what, what became of it."""

    plan: Plan
    progress: Progress | None
    tell: Callable[[Result], None] | None
    results: list[Result] = field(default_factory=list)
    keys: dict[int, tuple[_Key, Sequence[Any]]] = field(default_factory=dict)
    stopped: bool = False

    def pending(self, workers: int) -> Iterator[tuple[Job, ...]]:
        """What there is to do: merges into one base in as many bundles as there are workers, other jobs one by one."""
        for group in self.plan.groups:
            size = min(BUNDLE, -(-len(group) // workers))
            held: list[Job] = []
            for job in group:
                if self.stopped:
                    return
                if (claimed := self._claimed(job)) is not None:
                    held.append(claimed)
                if held and (len(held) == size or not _together(held[-1])):
                    yield self._begun(held)
                    held = []
            if held and not self.stopped:
                yield self._begun(held)

    def _claimed(self, job: Job) -> Job | None:
        """The job, if it is to be done."""
        ledger = self.plan.ledger
        try:
            if ledger.finished(job):
                self._add(Result(job, "skipped"))
                return None
            claimed = _claimed(self.plan, job)
            before = ledger.signature(job)  # first: what changes while it is hashed must show
            self.keys[job.number] = _Key(ledger, job, meanwhile=all(before)), before
        except AdaptkitError as error:
            self._failed(job, Outcome(error=str(error), hint=error.hint))
            return None
        return claimed

    def _begun(self, held: Sequence[Job]) -> tuple[Job, ...]:
        for job in held:
            self.plan.ledger.start(job)
        return tuple(held)

    def ended(self, job: Job, outcome: Outcome) -> None:
        key, signature = self.keys.pop(job.number)
        try:
            found = key.get()
        except AdaptkitError as error:
            found, outcome = "", Outcome(error=str(error), hint=error.hint)
        if outcome.error is not None:
            self._failed(job, outcome)
        elif self.plan.ledger.signature(job) != signature:
            self._failed(
                job,
                Outcome(error=CHANGED, hint="run the batch again when the inputs stay as they are"),
            )
        else:
            self.plan.ledger.done(job, found, outcome.report, outcome.seconds)
            self._add(Result(job, "done", outcome))

    def _failed(self, job: Job, outcome: Outcome) -> None:
        self.plan.ledger.failed(job, outcome.error or "", outcome.hint)
        self._add(Result(job, "failed", outcome))
        self.stopped = not self.plan.options.keep_going

    def _add(self, result: Result) -> None:
        self.results.append(result)
        if self.tell is not None:
            self.tell(result)
        if self.progress is not None:
            self.progress(len(self.results), len(self.plan.jobs))
