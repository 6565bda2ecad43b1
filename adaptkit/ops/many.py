"""One verb over many adapters: each is written by itself, and one that fails stops no other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.adapter import open_adapter_source
from adaptkit.detect import is_adapter
from adaptkit.errors import AdaptkitError, CannotWrite, NothingToDo, WouldOverwrite
from adaptkit.files.hub import from_hub
from adaptkit.formats.contract import Alpha
from adaptkit.ops.adapter_file.writer import check_adapter_output
from adaptkit.ops.finding import found_in
from adaptkit.ops.shared import Brief
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from adaptkit.ops.shared import WriterReport
    from adaptkit.ops.stages import Progress
    from adaptkit.ops.verb import Verb

__all__ = ["Done", "Foreseen", "is_many", "plan_many", "run_many"]

_SUFFIX = ".safetensors"
# the stage of a verb over many inputs
MANY = {"convert": "converting", "resize": "resizing"}


@dataclass(frozen=True, repr=False)
class Done(Brief):
    """What became of one input: the report of its output, or the error."""

    path: Path
    name: str
    report: WriterReport | None = None
    error: AdaptkitError | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        if self.report is not None:
            return {"path": str(self.path), **self.report.to_dict()}
        assert self.error is not None
        return {"path": str(self.path), "error": self.error.to_dict()}


@dataclass(frozen=True, repr=False)
class Foreseen(Brief):
    """What would become of one input: the plan of its output, or the error."""

    path: Path
    name: str
    plan: Mapping[str, Any] | None = None
    error: AdaptkitError | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        if self.plan is not None:
            return {"path": str(self.path), **self.plan}
        assert self.error is not None
        return {"path": str(self.path), "error": self.error.to_dict()}


def is_many(paths: Sequence[str | PathLike[str]]) -> bool:
    """Whether these are several adapters: files, a glob, or a folder that is not one adapter."""
    if len(paths) != 1:
        return True
    found = [path for path, _ in found_in(paths)]
    return found != [Path(paths[0])]


def run_many(
    verb: Verb,
    paths: Sequence[str | PathLike[str]],
    options: Any,
    suffix: str = "",
    progress: Progress | None = None,
) -> list[Done]:
    """Run a verb of one adapter on every adapter of `paths`; `progress` counts inputs.

    `options.output` is the folder to write to, which keeps the names of files below it; without it
    each output lies beside its input. `suffix` is added to names. Checkpoints are passed over.
    """
    inputs = _inputs(paths, options)
    done: list[Done] = []
    told = counting(progress, MANY.get(verb.name, "running"), len(inputs), "files")
    for path, name in inputs:
        try:
            report = _one(verb, path, name, options, suffix)
            done.append(Done(path, name, report))
        except AdaptkitError as error:
            done.append(Done(path, name, error=error.at(file=path)))
        if told is not None:
            told(len(done))
    return done


def plan_many(
    verb: Verb,
    paths: Sequence[str | PathLike[str]],
    options: Any,
    suffix: str = "",
    progress: Progress | None = None,
) -> list[Foreseen]:
    """What `run_many` would write; headers are read, and nothing is written."""
    inputs = _inputs(paths, options)
    found: list[Foreseen] = []
    taken: set[Path] = set()
    told = counting(progress, "planning", len(inputs), "files")
    for path, name in inputs:
        try:
            with _planned(verb, path, name, options, suffix) as plan:
                if plan.output in taken:
                    raise WouldOverwrite("two inputs would be written to it", file=plan.output)
                taken.add(plan.output)
                found.append(Foreseen(path, name, plan.to_dict()))
        except AdaptkitError as error:
            found.append(Foreseen(path, name, error=error.at(file=path)))
        if told is not None:
            told(len(found))
    return found


def _inputs(paths: Sequence[str | PathLike[str]], options: Any) -> list[tuple[Path, str]]:
    folder = options.output
    if folder is not None and folder.exists() and not folder.is_dir():
        raise CannotWrite("several inputs are written to a folder, and this is a file", file=folder)
    inputs = list(_adapters(paths))
    if not inputs:
        raise NothingToDo("none of these files is an adapter", file=paths[0] if paths else None)
    return inputs


def _adapters(paths: Sequence[str | PathLike[str]]) -> Iterator[tuple[Path, str]]:
    """Every input that is an adapter, or that cannot be read."""
    for path, name in found_in(paths):
        try:
            source, _ = open_adapter_source(path)
            with source:
                meant = is_adapter(source.infos)
        except AdaptkitError:
            meant = True
        if meant:
            yield path, name


def _one(verb: Verb, path: Path, name: str, options: Any, suffix: str) -> WriterReport:
    with _planned(verb, path, name, options, suffix) as plan:
        plan.output.parent.mkdir(parents=True, exist_ok=True)
        written: WriterReport = verb.perform(plan)
        return written


def _planned(verb: Verb, path: Path, name: str, options: Any, suffix: str) -> Any:
    """The plan of one input, with its output below the folder."""
    folder: Path | None = options.output
    if folder is None and not suffix:
        return verb.plan(path, options)
    beside = Path() if from_hub(path) else path.parent
    home = beside if folder is None else folder / Path(name).parent
    stem = Path(name).stem if not path.is_dir() else Path(name).name
    stem = f"{stem}-{suffix}" if suffix else stem
    # the folder need not exist yet; whether the output is one depends on the format that is chosen
    existing = next(parent for parent in (home, *home.parents) if parent.is_dir())
    plan = verb.plan(path, replace(options, output=existing / f".{stem}.planned"))
    try:
        config = plan.keys.format.alpha is Alpha.CONFIG
        output = home / (stem if config else f"{stem}{_SUFFIX}")
        if home.is_dir():
            check_adapter_output(output, folder=config, overwrite=options.overwrite)
        return replace(plan, output=output)
    except AdaptkitError:
        plan.close()
        raise
