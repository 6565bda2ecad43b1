"""Engines that run the jobs of a batch, in this process or in worker processes.

An engine turns bundles of jobs into outcomes, in any order. It pulls a bundle only when a worker is
free, and returns every job it pulled. The jobs of a bundle are merges into one base, which is read
once for all of them. A worker process imports torch once and runs job after job.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import adaptkit
from adaptkit.errors import AdaptkitError, InternalError, NotEnoughMemory
from adaptkit.ops.verb import verb

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from adaptkit.ops.batch.recipe import Job

    Bundle = tuple[Job, ...]

__all__ = [
    "POLL",
    "Engine",
    "Here",
    "Outcome",
    "Processes",
    "answer",
    "cleaned",
    "environment",
    "outcomes",
    "perform",
    "planned",
]

T = TypeVar("T")

# seconds: on Windows only a wait with a timeout can be interrupted
POLL = 0.2
# seconds for an interrupted worker to remove its partial files
PATIENCE = 15.0


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job: the numbers of its report, or the error."""

    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    hint: str | None = None
    seconds: float = 0.0


class Engine(Protocol):
    """A runner of jobs, `workers` bundles at a time."""

    def run(self, bundles: Iterable[Bundle]) -> Generator[tuple[Job, Outcome]]:
        """Yield each job with its outcome, as they end."""
        ...

    @property
    def workers(self) -> int:
        """Return the number of concurrent bundles."""
        ...


def planned(job: Job, **changed: Any) -> Any:
    """Plan a job from headers only; `changed` replaces options."""
    found = verb(job.command)
    weighed = [item for item in job.inputs if item.role == "adapter" and found.weighs]
    given: list[Any] = [item.path for item in job.inputs if item not in weighed]
    if weighed:
        given.append([(item.path, item.strength) for item in weighed])
    return found.plan(*given, found.options(**{**job.options, **changed}))


def perform(bundle: Bundle) -> list[Outcome]:
    """Run the jobs of a bundle; every failure except an interrupt is an outcome.

    Jobs with a valid plan run together. If that fails, each runs alone, to find the one at fault.
    """
    if len(bundle) == 1:
        return [_alone(bundle[0])]
    found: list[Outcome | None] = [None] * len(bundle)
    with contextlib.ExitStack() as stack:
        plans: dict[int, Any] = {}
        for n, job in enumerate(bundle):
            plan = _attempt(lambda job=job: _prepared(job))  # type: ignore[misc]
            if isinstance(plan, Outcome):
                found[n] = plan
            else:
                plans[n] = plan
                stack.callback(plan.close)
        together = _attempt(lambda: _together(bundle[0].command, list(plans.values())))
    if isinstance(together, list):
        for n, report in zip(plans, together, strict=True):
            found[n] = Outcome(_numbers(report.to_dict()), seconds=report.seconds)
    return [outcome or _alone(job) for job, outcome in zip(bundle, found, strict=True)]


def _together(command: str, plans: Sequence[Any]) -> Any:
    together = verb(command).together
    assert together is not None
    return together(plans)


def _prepared(job: Job) -> Any:
    job.output.parent.mkdir(parents=True, exist_ok=True)
    return planned(job)


def _alone(job: Job) -> Outcome:
    started = time.perf_counter()

    def work() -> Outcome:
        with contextlib.closing(_prepared(job)) as plan:
            report = verb(job.command).run(plan).to_dict()
        return Outcome(_numbers(report))

    return replace(_attempt(work), seconds=time.perf_counter() - started)


def _attempt(work: Callable[[], T]) -> T | Outcome:
    """Return the result of `work`, or its error as an outcome."""
    try:
        return work()
    except Exception as error:
        # whatever happens in one job must not end the others
        found = InternalError.of(error)
        if os.environ.get("ADAPTKIT_DEBUG"):
            traceback.print_exception(error)
        hint = found.hint
        if isinstance(found, NotEnoughMemory) and not isinstance(error, AdaptkitError):
            hint = "use fewer --jobs, or set a lower memory in the recipe"
        return Outcome(error=str(found), hint=hint)


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names and numbers of a report for the log, without its modules."""
    kept = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in report.items()
        if isinstance(value, int | float | str) and name not in ("output", "seconds")
    }
    return {**kept, "unused": len(report.get("unused", ())), "notes": list(report.get("notes", ()))}


class Here:
    """Engine that runs one bundle after the other in this process."""

    workers = 1

    def run(self, bundles: Iterable[Bundle]) -> Generator[tuple[Job, Outcome]]:
        """See `Engine`."""
        for bundle in bundles:
            yield from zip(bundle, perform(bundle), strict=True)


class Todo:
    """Queue of bundles; jobs of a bundle whose worker died come first, one by one."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._coming, self._more = iter(bundles), True
        self._again: deque[Bundle] = deque()

    def __bool__(self) -> bool:
        return self._more or bool(self._again)

    def take(self) -> Bundle | None:
        """Return the next bundle, or None at the end."""
        bundle = self._again.popleft() if self._again else next(self._coming, None)
        self._more = self._more and bundle is not None
        return bundle

    def split(self, bundle: Bundle) -> None:
        """Queue the jobs of a bundle one by one."""
        self._again.extend((job,) for job in bundle)


@dataclass(frozen=True)
class Processes:
    """Engine of worker processes.

    If a worker dies, its job fails, or the jobs of its bundle are repeated one by one, and a new
    worker starts.
    """

    workers: int = 1
    # seconds for each job of a bundle
    timeout: float | None = None

    def run(self, bundles: Iterable[Bundle]) -> Generator[tuple[Job, Outcome]]:
        """See `Engine`."""
        replies: queue.SimpleQueue[tuple[WorkerProcess, bytes]] = queue.SimpleQueue()
        idle: list[WorkerProcess] = []
        busy: dict[WorkerProcess, Bundle] = {}
        todo = Todo(bundles)
        try:
            while todo or busy:
                while len(busy) < self.workers and (bundle := todo.take()) is not None:
                    worker = idle.pop() if idle else WorkerProcess(replies, self.workers)
                    busy[worker] = bundle
                    worker.send(bundle)
                self._end_late(busy)
                if busy and (answer := _next(replies)) is not None:
                    worker, line = answer
                    if worker in busy:
                        bundle = busy.pop(worker)
                        if line:
                            idle.append(worker)
                            yield from zip(bundle, outcomes(line), strict=True)
                        elif len(bundle) > 1:
                            worker.died(bundle)
                            todo.split(bundle)
                        else:
                            yield bundle[0], worker.died(bundle)
                    elif worker in idle:
                        # it died between two jobs: nothing was lost
                        idle.remove(worker)
        finally:
            _stop([*idle, *busy], interrupt=bool(busy))
            for worker, bundle in busy.items():
                worker.clean(bundle)

    def _end_late(self, busy: Mapping[WorkerProcess, Bundle]) -> None:
        """Kill the workers that take too long; they answer as those that died."""
        for worker, bundle in busy.items():
            late = self.timeout is not None and time.monotonic() - worker.began > (
                self.timeout * len(bundle)
            )
            if late and not worker.late:
                worker.late = True
                worker.process.kill()


def _next(
    replies: queue.SimpleQueue[tuple[WorkerProcess, bytes]],
) -> tuple[WorkerProcess, bytes] | None:
    try:
        return replies.get(timeout=POLL)
    except queue.Empty:
        return None


class WorkerProcess:
    """A process that answers bundles as JSON lines; it sends an empty line when it ends."""

    def __init__(self, replies: queue.SimpleQueue[tuple[WorkerProcess, bytes]], count: int) -> None:
        self.began, self.late = time.monotonic(), False
        # its stderr, open as long as the process
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        # only the parent receives ^C and decides
        own: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "adaptkit.ops.batch.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=environment(count),
            **own,
        )
        threading.Thread(target=self._listen, args=(replies,), daemon=True).start()

    def _listen(self, replies: queue.SimpleQueue[tuple[WorkerProcess, bytes]]) -> None:
        for line in _pipe(self.process.stdout):
            replies.put((self, line))
        replies.put((self, b""))

    def send(self, bundle: Bundle) -> None:
        """Send jobs; a dead process is reported by its empty line."""
        self.began = time.monotonic()
        with contextlib.suppress(OSError):
            pipe = _pipe(self.process.stdin)
            pipe.write((json.dumps([job.to_dict() for job in bundle]) + "\n").encode())
            pipe.flush()

    def died(self, bundle: Bundle) -> Outcome:
        """Return the outcome of the job that was running when the process ended."""
        code = self.process.wait()
        self.clean(bundle)
        if self.late:
            return Outcome(error="it took longer than --timeout", hint="give it more seconds")
        hint = "memory may have run out: use fewer --jobs, or set memory in the recipe"
        if code < 0:
            return Outcome(error=f"its worker process was killed ({_signal(-code)})", hint=hint)
        self.said.seek(0)
        words = self.said.read().decode("utf-8", "replace").strip().splitlines()
        return Outcome(
            error=": ".join([f"its worker process ended with exit code {code}", *words[-1:]]),
            hint=hint,
        )

    def clean(self, bundle: Bundle) -> None:
        """Remove its partial files."""
        cleaned(bundle, self.process.pid)

    def interrupt(self) -> None:
        """Interrupt the process as ^C does."""
        with contextlib.suppress(OSError, ValueError):
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))

    def close(self) -> None:
        """Close its stdin, which ends the process."""
        with contextlib.suppress(OSError):
            _pipe(self.process.stdin).close()


def cleaned(bundle: Bundle, pid: int) -> None:
    """Remove the partial files of a dead process (files/output_file.py names them)."""
    for job in bundle:
        for left in job.output.parent.glob(f".*{glob.escape(job.output.name[:40])}*.{pid}-*.part"):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _stop(workers: Iterable[WorkerProcess], *, interrupt: bool) -> None:
    """End all workers; kill those that do not react."""
    listed = list(workers)
    try:
        for worker in listed:
            if interrupt:
                worker.interrupt()
            worker.close()
        end = time.monotonic() + PATIENCE
        for worker in listed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, end - time.monotonic()))
    finally:
        for worker in listed:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
            worker.said.close()


def environment(count: int) -> dict[str, str]:
    """Return variables that share the cores, unless set, and locate this package."""
    home = str(Path(adaptkit.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ours = (
        {"OMP_NUM_THREADS": str(max(1, cores // count)), "OMP_WAIT_POLICY": "PASSIVE"}
        if count > 1
        else {}
    )
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **ours,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def answer(found: Iterable[Outcome]) -> str:
    """Return the outcomes of a bundle as one line of ASCII JSON."""
    return json.dumps([asdict(outcome) for outcome in found]) + "\n"


def outcomes(line: bytes | str) -> list[Outcome]:
    """Invert `answer`."""
    return [Outcome(**record) for record in json.loads(line)]
