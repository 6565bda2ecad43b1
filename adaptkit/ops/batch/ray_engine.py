"""Engine that runs the bundles of a batch on a Ray cluster.

Recipe, log and failures are the same as with local processes. Every machine of the cluster must
see the files under the same paths.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError
from adaptkit.ops.batch.recipe import Job
from adaptkit.ops.batch.workers import POLL, Outcome, Todo, cleaned, environment, perform

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    Bundle = tuple[Job, ...]

__all__ = ["Ray"]

HINT = "memory may have run out: use fewer --jobs, or set memory in the recipe"


class _Actor:
    """A process of the cluster, which imports torch once and runs bundle after bundle."""

    def __init__(self, folder: str) -> None:
        # relative paths mean the same as for the caller
        os.chdir(folder)

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def perform(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run a bundle; jobs and outcomes travel as dictionaries."""
        return [asdict(outcome) for outcome in perform(tuple(map(Job.from_dict, records)))]


@dataclass(frozen=True, eq=False)
class _RayWorker:
    actor: Any
    # a reference, resolved only if the worker dies
    pid: Any


@dataclass
class Ray:
    """`count` actors on a Ray cluster; None is one per CPU.

    `address` is that of ray.init; None uses RAY_ADDRESS, a running local cluster, or a temporary
    one. If an actor dies, its job fails, or the jobs of its bundle are repeated one by one, and a
    new actor starts.
    """

    count: int | None = None
    address: str | None = None
    workers: int = field(init=False)
    _ours: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        ray = _ray()
        if not ray.is_initialized():
            self._connect(ray)
        self.workers = self.count or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def _connect(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        address = self.address or os.environ.get("RAY_ADDRESS")
        self._ours = True
        try:
            ray.init(address=address or "auto", **quiet)
        except ConnectionError as error:
            if address:
                message = f"cannot connect to a Ray cluster at {address}"
                raise AdaptkitError(message, hint="start one with `ray start --head`") from error
            ray.init(address="local", num_cpus=self.count, include_dashboard=False, **quiet)

    def run(self, bundles: Iterable[Bundle]) -> Generator[tuple[Job, Outcome]]:
        """See `adaptkit.ops.batch.workers.Engine`."""
        ray = _ray()
        idle: list[_RayWorker] = []
        busy: dict[Any, tuple[_RayWorker, Bundle]] = {}
        todo = Todo(bundles)
        try:
            while todo or busy:
                while len(busy) < self.workers and (bundle := todo.take()) is not None:
                    worker = idle.pop() if idle else self._worker(ray)
                    busy[worker.actor.perform.remote([job.to_dict() for job in bundle])] = (
                        worker,
                        bundle,
                    )
                for ready in ray.wait(list(busy), timeout=POLL)[0] if busy else []:
                    worker, bundle = busy.pop(ready)
                    outcomes = _outcomes(ray, ready, bundle)
                    if outcomes is not None:
                        idle.append(worker)
                        yield from zip(bundle, outcomes, strict=True)
                        continue
                    _clean(ray, worker, bundle)
                    if len(bundle) > 1:
                        todo.split(bundle)
                    else:
                        yield (
                            bundle[0],
                            Outcome(
                                error="its worker process on the Ray cluster was killed", hint=HINT
                            ),
                        )
        finally:
            for worker, bundle in busy.values():
                _kill(ray, worker)
                _clean(ray, worker, bundle)
            for worker in idle:
                _kill(ray, worker)
            if self._ours:
                ray.shutdown()

    def _worker(self, ray: Any) -> _RayWorker:
        options = {
            "num_cpus": 1,
            "max_restarts": 0,
            "runtime_env": {"env_vars": dict(self._environment())},
        }
        actor = ray.remote(_Actor).options(**options).remote(os.getcwd())  # noqa: PTH109 - as text
        return _RayWorker(actor, actor.pid.remote())

    def _environment(self) -> Iterator[tuple[str, str]]:
        """Yield the variables that differ from this process."""
        for name, value in environment(self.workers).items():
            if os.environ.get(name) != value:
                yield name, value


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise AdaptkitError("--engine ray needs Ray", hint="pip install 'adaptkit[ray]'") from None
    return ray


def _outcomes(ray: Any, ready: Any, bundle: Bundle) -> list[Outcome] | None:
    """Return the answer of an actor, or None if it died."""
    try:
        return [Outcome(**record) for record in ray.get(ready)]
    except ray.exceptions.RayActorError as error:
        if "The actor died because of an error raised in its creation task" in str(error):
            words = str(error.__cause__ or error).strip().splitlines()[-1]
            failed = Outcome(
                error=f"no worker can start on the Ray cluster: {words}",
                hint="put the files on shared storage",
            )
            return [failed] * len(bundle)
        return None
    except ray.exceptions.RayError as error:
        return [Outcome(error=f"Ray: {str(error).strip().splitlines()[-1]}")] * len(bundle)


def _kill(ray: Any, worker: _RayWorker) -> None:
    with contextlib.suppress(Exception):
        ray.kill(worker.actor)


def _clean(ray: Any, worker: _RayWorker, bundle: Bundle) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        cleaned(bundle, ray.get(worker.pid, timeout=PATIENCE))


# seconds to fetch an answer that is already there
PATIENCE = 2.0
