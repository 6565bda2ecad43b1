"""batch: run the jobs of a recipe; skip finished ones, report failures, resume after a stop."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError, NoSuchName, WouldOverwrite, WrongUsage
from adaptkit.ops.batch.log import Ledger
from adaptkit.ops.batch.recipe import load
from adaptkit.ops.batch.workers import Engine, Here, Outcome, Processes, planned
from adaptkit.ops.shared import Brief
from adaptkit.ops.stages import counting, log
from adaptkit.ops.verb import verb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from adaptkit.ops.batch.recipe import Job
    from adaptkit.ops.stages import Progress

__all__ = ["Options", "Plan", "Preview", "Report", "Result", "plan", "preview", "run"]

# outputs that are written at once
BUNDLE = 16
ENGINES = ("local", "ray")
CHANGED = "an input changed while it was read"


@dataclass(frozen=True)
class Options:
    """Options of batch.

    `jobs` is the number of worker processes, 0 to work in this process; None is one, or one per CPU
    of a Ray cluster. `overwrite` also replaces outputs that this recipe did not write. `engine` is
    `local`, or `ray` with the `address` of the cluster. A job that takes longer than `timeout`
    seconds fails. Outputs outside the recipe's folder need `allow_outside`.
    """

    jobs: int | None = None
    keep_going: bool = False
    overwrite: bool = False
    engine: str = "local"
    address: str | None = None
    timeout: float | None = None
    allow_outside: bool = False


@dataclass(frozen=True, repr=False)
class Plan(Brief):
    """All jobs of a recipe.

    `groups` holds them in the order of execution. Jobs on one base are consecutive, and merges
    into it share a pass.
    """

    recipe: Path
    options: Options
    groups: tuple[tuple[Job, ...], ...]
    ledger: Ledger

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Return the jobs in the order of execution."""
        return tuple(job for group in self.groups for job in group)


@dataclass(frozen=True, repr=False)
class Result(Brief):
    """Result of one job: `status` is done, skipped (done before) or failed."""

    job: Job
    status: str
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def bytes(self) -> int:
        """Return the size of the output if this run wrote it, else 0."""
        return int(self.outcome.report.get("bytes", 0))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON record."""
        found = {**_name(self.job), "status": self.status}
        if self.status == "done":
            found |= {**self.outcome.report, "seconds": round(self.outcome.seconds, 3)}
        if self.status == "failed":
            found |= {"error": self.outcome.error, "hint": self.outcome.hint}
        return found


@dataclass(frozen=True, repr=False)
class Report(Brief):
    """Results in the order of the recipe; `not_run` counts the jobs after the first failure."""

    recipe: Path
    log: Path
    results: tuple[Result, ...]
    not_run: int
    seconds: float

    @property
    def failures(self) -> tuple[Result, ...]:
        """Return the failed jobs."""
        return tuple(result for result in self.results if result.status == "failed")

    def count(self, status: str) -> int:
        """Return the number of jobs that are done, skipped or failed."""
        return sum(result.status == status for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
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


@dataclass(frozen=True, repr=False)
class Preview(Brief):
    """Plans of the unfinished jobs, or the errors they would fail with.

    `peak_memory` is that of as many concurrent jobs as there are workers.
    """

    recipe: Path
    jobs: int
    skipped: int
    plans: tuple[Mapping[str, Any], ...]
    failures: tuple[Result, ...]
    peak_memory: int

    def total(self, *names: str) -> int:
        """Sum, over the jobs, the first of these figures that each job has."""
        return sum(next((plan[name] for name in names if name in plan), 0) for plan in self.plans)

    @property
    def open_sizes(self) -> int:
        """Return the number of jobs whose output size depends on the weights."""
        return sum("bytes_out_copied" in plan and plan["peak_memory"] > 0 for plan in self.plans)

    @property
    def bytes_out(self) -> int:
        """Return the known bytes to write; an upper bound for extractions."""
        return self.total("bytes_out", "bytes_out_at_most", "bytes_out_copied")

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return the JSON document; `details` adds the records of all modules."""
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


def plan(recipe: str | PathLike[str], options: Options) -> Plan:
    """Read the recipe and its log; open no input."""
    recipe = Path(recipe)
    if options.jobs is not None and options.jobs < 0:
        raise WrongUsage(f"--jobs must be >= 0, got {options.jobs}")
    if options.engine not in ENGINES:
        raise NoSuchName.among("engine", options.engine, ENGINES)
    if options.timeout is not None and (options.jobs == 0 or options.engine != "local"):
        raise WrongUsage("--timeout needs worker processes on this machine", hint="use --jobs 1")
    ledger = Ledger(recipe)
    jobs = load(recipe, ledger.made())
    if not options.allow_outside:
        _check_inside(recipe, jobs)
    return Plan(recipe, options, _by_base(jobs), ledger)


def _check_inside(recipe: Path, jobs: Iterable[Job]) -> None:
    """Refuse outputs outside the folder of a recipe, which a stranger may have written."""
    # does not follow symbolic links
    root = Path(os.path.abspath(recipe.parent))  # noqa: PTH100
    for job in jobs:
        if not Path(os.path.abspath(job.output)).is_relative_to(root):  # noqa: PTH100
            raise WrongUsage(
                f"{job.place} writes outside the folder of the recipe: {job.output}",
                hint="--allow-outside permits it",
                file=recipe,
            )


def _by_base(jobs: Iterable[Job]) -> tuple[tuple[Job, ...], ...]:
    """Group jobs on the same base; keep the order of the recipe otherwise."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        bases = [item.path for item in job.inputs if item.role == "base"]
        # does not follow symbolic links
        group = os.path.abspath(bases[0]) if bases else job.number  # noqa: PTH100
        groups.setdefault(group, []).append(job)
    return tuple(map(tuple, groups.values()))


def _together(job: Job) -> bool:
    """Return whether a job may share a pass with others on its base."""
    return verb(job.command).together is not None and not job.options.get("verify", False)


def preview(plan: Plan, progress: Progress | None = None) -> Preview:
    """Plan every unfinished job; write nothing and do not import torch."""
    plan = replace(plan, ledger=Ledger(plan.recipe, keep=False))
    plans, failures, skipped = [], [], 0
    told = counting(progress, "planning", len(plan.jobs), "jobs")
    for n, job in enumerate(plan.jobs, 1):
        try:
            if plan.ledger.finished(job):
                skipped += 1
            else:
                plans.append({**_name(job), **_foreseen(_claimed(plan, job))})
        except AdaptkitError as error:
            failures.append(Result(job, "failed", Outcome(error=str(error), hint=error.hint)))
        if told is not None:
            told(n)
    peak = sum(nlargest(plan.options.jobs or 1, (found["peak_memory"] for found in plans)))
    plans.sort(key=lambda found: found["job"])
    return Preview(plan.recipe, len(plan.jobs), skipped, tuple(plans), tuple(failures), peak)


def _foreseen(job: Job) -> dict[str, Any]:
    """Return the plan of one job; a missing output folder is replaced by an existing parent."""
    folder = job.output.parent
    changed: dict[str, Any] = {}
    if not folder.exists():
        above = next((path for path in folder.parents if path.exists()), folder)
        changed = {"output": above / f"{os.urandom(8).hex()}-{job.output.name}"}
    with closing(planned(job, **changed)) as found:
        return {**found.to_dict(), "output": str(job.output)}


def _claimed(plan: Plan, job: Job) -> Job:
    """Allow a job to replace an output of this recipe; raise WouldOverwrite for other files."""
    allowed = (
        plan.options.overwrite
        or job.options.get("overwrite", False)
        or (job.output.exists() and plan.ledger.ours(job))
    )
    if job.output.exists() and not allowed:
        hint = "pass --overwrite to replace it, or change the output in the recipe"
        raise WouldOverwrite(
            "already exists, and this recipe did not write it", hint=hint, file=job.output
        )
    return replace(job, options={**job.options, "overwrite": allowed})


def run(
    plan: Plan,
    progress: Progress | None = None,
    tell: Callable[[Result], None] | None = None,
    engine: Engine | None = None,
) -> Report:
    """Run every unfinished job; call `tell` with each result.

    The first failure ends the batch unless `keep_going` is set; running jobs are finished. After
    an interrupt at any moment, the next run resumes from the log.
    """
    started = time.perf_counter()
    found = _Run(plan, counting(progress, "running", len(plan.jobs), "jobs"), tell)
    workers = engine or _engine(plan.options)
    # closing stops the workers as soon as the loop is left
    with closing(workers.run(found.pending(workers.workers))) as outcomes:
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
    return Here() if options.jobs == 0 else Processes(options.jobs or 1, options.timeout)


class _Key:
    """The key of a job, hashed `meanwhile` in the background, or at once."""

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
        """Wait for the key; raise the error of an unreadable input."""
        self._thread.join()
        (found,) = self._found
        if isinstance(found, AdaptkitError):
            raise found
        return found


@dataclass
class _Run:
    """The state of a run: keys of running jobs, and results."""

    plan: Plan
    counted: Callable[[int], None] | None
    tell: Callable[[Result], None] | None
    results: list[Result] = field(default_factory=list)
    keys: dict[int, tuple[_Key, Sequence[Any]]] = field(default_factory=dict)
    stopped: bool = False

    def pending(self, workers: int) -> Iterator[tuple[Job, ...]]:
        """Yield bundles of jobs: merges into one base together, other jobs one by one."""
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
        """Return the job if it must run."""
        ledger = self.plan.ledger
        try:
            if ledger.finished(job):
                self._add(Result(job, "skipped"))
                return None
            claimed = _claimed(self.plan, job)
            # before hashing, so that a change during it is detected
            before = ledger.signature(job)
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
        """Record the outcome of a job, which fails if an input changed meanwhile."""
        key, signature = self.keys.pop(job.number)
        try:
            found = key.get()
        except AdaptkitError as error:
            found, outcome = "", Outcome(error=str(error), hint=error.hint)
        if outcome.error is not None:
            self._failed(job, outcome)
        elif self.plan.ledger.signature(job) != signature:
            self._failed(
                job, Outcome(error=CHANGED, hint="run the batch again when the inputs are complete")
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
        log().info("%s: %s %s", result.status, result.job.command, result.job.output)
        if self.counted is not None:
            self.counted(len(self.results))
