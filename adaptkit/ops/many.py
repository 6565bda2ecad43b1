"""One verb over many adapters: each is written by itself, and one that fails stops no other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.adapter import open_adapter_source
from adaptkit.detect import is_adapter
from adaptkit.errors import AdaptkitError, CannotWrite, NothingToDo
from adaptkit.formats.contract import Alpha
from adaptkit.ops.adapter_file.writer import check_adapter_output
from adaptkit.ops.finding import found_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from os import PathLike

    from adaptkit.ops.shared import Progress, WriterReport
    from adaptkit.ops.verb import Verb

__all__ = ["Done", "is_many", "run_many"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Done:
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
    folder = options.output
    if folder is not None and folder.exists() and not folder.is_dir():
        raise CannotWrite("several inputs are written to a folder, and this is a file", file=folder)
    inputs = list(_adapters(paths))
    if not inputs:
        raise NothingToDo("none of these files is an adapter", file=paths[0] if paths else None)
    done: list[Done] = []
    for path, name in inputs:
        try:
            report = _one(verb, path, name, options, suffix)
            done.append(Done(path, name, report))
        except AdaptkitError as error:
            done.append(Done(path, name, error=error.at(file=path)))
        if progress is not None:
            progress(len(done), len(inputs))
    return done


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
    folder: Path | None = options.output
    if folder is None and not suffix:
        with verb.plan(path, options) as plan:
            found: WriterReport = verb.run(plan)
            return found
    home = path.parent if folder is None else folder / Path(name).parent
    stem = Path(name).stem if not path.is_dir() else Path(name).name
    stem = f"{stem}-{suffix}" if suffix else stem
    home.mkdir(parents=True, exist_ok=True)
    # whether it is a folder depends on the format, which the plan chooses
    with verb.plan(path, replace(options, output=home / f".{stem}.planned")) as plan:
        config = plan.keys.format.alpha is Alpha.CONFIG
        output = home / (stem if config else f"{stem}{_SUFFIX}")
        check_adapter_output(output, folder=config, overwrite=options.overwrite)
        written: WriterReport = verb.run(replace(plan, output=output))
        return written
