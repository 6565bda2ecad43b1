"""Recipes of batches: read TOML, return jobs, and report errors with their place.

A `[[job]]` is one job. In a `[[matrix]]` any value may be a list, and every combination is a job;
paths there may be globs. Keys are `command`, the inputs (`base`, `tuned`, `adapter`, `strength`,
or their plurals) and the Options of the command. `[defaults]` and `[defaults.<command>]` hold
default values. Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import AdaptkitError, CorruptFile, NothingToDo, WrongUsage
from adaptkit.files.header import unreadable
from adaptkit.ops.batch.output_names import filled, stem
from adaptkit.ops.batch.values import Reader, Rooted, check_known, inside, names_of, nearest
from adaptkit.ops.finding import matching
from adaptkit.ops.ranks.options import RULES
from adaptkit.ops.shared import split_strength
from adaptkit.ops.verb import verb, verbs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["Input", "Job", "load"]

PLURALS = {"bases": "base", "adapters": "adapter", "strengths": "strength"}
# a job with one of these takes none of the others from the defaults
RIVALS = ((*RULES, "conv_rank"), ("to", "host"))
TABLE = re.compile(r"^\s*\[\[\s*(job|matrix)\s*\]\]", re.MULTILINE)


@dataclass(frozen=True)
class Input:
    """A file or folder that a job reads, with a strength if the command takes one."""

    role: str
    path: Path
    strength: float | None = None


@dataclass(frozen=True)
class Job:
    """One command with its inputs and options; the output is among the options.

    `number` counts from 1 over the whole recipe. `place` is the position in the recipe.
    """

    number: int
    place: str
    command: str
    inputs: tuple[Input, ...]
    options: Mapping[str, Any]

    @property
    def output(self) -> Path:
        """Return the path of the output."""
        found: Path = self.options["output"]
        return found

    def reads(self) -> tuple[Path, ...]:
        """Return all files and folders that the job reads, including those in options."""
        named = (
            value
            for name, value in self.options.items()
            if isinstance(value, Path) and name != "output"
        )
        return (*(item.path for item in self.inputs), *named)

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON, for a worker process."""
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.options.items()
        }
        inputs = [[item.role, str(item.path), item.strength] for item in self.inputs]
        return {
            "number": self.number,
            "place": self.place,
            "command": self.command,
            "inputs": inputs,
            "options": options,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Job:
        """Invert `to_dict`."""
        kinds = verb(record["command"]).kinds
        options = {name: _restored(kinds[name], value) for name, value in record["options"].items()}
        inputs = tuple(
            Input(role, Path(path), strength) for role, path, strength in record["inputs"]
        )
        return cls(record["number"], record["place"], record["command"], inputs, options)


def _restored(kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...]:
        return tuple(value)
    return Path(value) if kind is Path and value is not None else value


def load(path: Path, made: Collection[Path] = ()) -> tuple[Job, ...]:
    """Return the jobs of a recipe in its order; read no other file.

    Globs skip hidden files and `made`, the absolute paths of what earlier runs wrote.
    """
    try:
        jobs = tuple(_jobs(path, _text(path), frozenset(made)))
        _check_apart(jobs)
        if not jobs:
            raise NothingToDo("the recipe has no [[job]] and no [[matrix]]")
    except AdaptkitError as error:
        raise error.at(file=path) from None
    return jobs


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CorruptFile(f"is not UTF-8 text: {error}", hint="save the recipe as UTF-8") from None


def _jobs(path: Path, text: str, made: frozenset[Path]) -> Iterator[Job]:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CorruptFile(
            f"is not valid TOML: {error}", hint="https://toml.io shows the syntax"
        ) from None
    for name in document.keys() - {"job", "matrix", "defaults"}:
        raise nearest("table", name, ["job", "matrix", "defaults"], "at the top")
    defaults = _Defaults.read(document.get("defaults", {}))
    number = 0
    for place, table, matrix in _tables(document, text):
        command, values = defaults.completed(_singular(table, place), place)
        axes = _Axes(path.parent, made, place, command)
        combinations = list(axes.combinations(values)) if matrix else [values]
        for n, chosen in enumerate(combinations, 1):
            number += 1
            where = f"{place}, {n} of {len(combinations)}" if matrix else place
            yield _Table(Reader(path.parent, where, command), chosen).job(number)


def _tables(document: Mapping[str, Any], text: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield (place, table, whether it is a matrix) in the order of the file."""
    found = {kind: document.get(kind, []) for kind in ("job", "matrix")}
    for kind, tables in found.items():
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise WrongUsage(
                f"`{kind}` is not a list of tables", hint=f"write [[{kind}]] above each"
            )
    lines = [(m.group(1), text.count("\n", 0, m.start(1)) + 1) for m in TABLE.finditer(text)]
    if any(sum(k == kind for k, _ in lines) != len(tables) for kind, tables in found.items()):
        # written as inline tables: no line numbers
        lines = [(kind, 0) for kind, tables in found.items() for _ in tables]
    seen = dict.fromkeys(found, 0)
    for kind, line in lines:
        seen[kind] += 1
        yield (
            f"[[{kind}]] {seen[kind]}" + (f" (line {line})" if line else ""),
            found[kind][seen[kind] - 1],
            kind == "matrix",
        )


def _singular(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        singular = PLURALS.get(name, name)
        if singular in found:
            raise WrongUsage(
                f"{place}: {singular} and {name} are the same", hint="use only one of them"
            )
        found[singular] = value
    return found


@dataclass(frozen=True)
class _Defaults:
    """Default values, for all commands with such an option and for each command."""

    every: Mapping[str, Any]
    each: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, table: Any) -> _Defaults:
        if not isinstance(table, dict):
            raise WrongUsage("`defaults` is not a table", hint="write [defaults]")
        each = {name: value for name, value in table.items() if isinstance(value, dict)}
        for name, values in each.items():
            if name not in verbs():
                raise nearest("command", name, verbs(), "[defaults]")
            each[name] = _singular(values, f"[defaults.{name}]")
            for key in each[name]:
                check_known(key, names_of(name), f"[defaults.{name}]")
        every = _singular(
            {name: value for name, value in table.items() if name not in each}, "[defaults]"
        )
        for name in every:
            check_known(name, set().union(*map(names_of, verbs())), "[defaults]")
        return cls(every, each)

    def completed(self, given: dict[str, Any], place: str) -> tuple[str, dict[str, Any]]:
        """Return the command and its values: the job's, then its command's, then all others'."""
        command = given.pop("command", None)
        if not isinstance(command, str):
            raise WrongUsage(
                f"{place}: it has no command", hint=f"add command, one of: {', '.join(verbs())}"
            )
        if command not in verbs():
            raise nearest("command", command, verbs(), place)
        known = names_of(command)
        for name in given:
            check_known(name, known, place)
        found: dict[str, Any] = {}
        every = {name: value for name, value in self.every.items() if name in known}
        for stronger in (every, self.each.get(command, {}), given):
            beaten = {name for group in RIVALS if stronger.keys() & {*group} for name in group}
            found = {
                **{name: value for name, value in found.items() if name not in beaten},
                **stronger,
            }
        return command, found


@dataclass(frozen=True)
class _Axes:
    """Expansion of the lists of a matrix."""

    root: Path
    made: frozenset[Path]
    place: str
    command: str

    def combinations(self, table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield every combination; the last key of the table varies fastest."""
        axes = [[(name, value) for value in self._axis(name, table[name])] for name in table]
        yield from (dict(chosen) for chosen in product(*axes))

    def _axis(self, name: str, value: Any) -> list[Any]:
        if verb(self.command).kinds.get(name) == tuple[str, ...]:
            # a list is one value, a list of lists several
            several = isinstance(value, list) and any(isinstance(item, list) for item in value)
            return value if several else [value]
        values = value if isinstance(value, list) else [value]
        if not values:
            raise WrongUsage(f"{self.place}: {name} is an empty list")
        if name in verb(self.command).inputs and name != "strength":
            return [found for item in values for found in self._globbed(item, name)]
        return values

    def _globbed(self, item: Any, name: str) -> list[Any]:
        """Return the sorted matches of a glob; each gets the strength of the pattern."""
        if not isinstance(item, str) or not any(mark in item for mark in "*?["):
            return [item]
        whole = inside(self.root, item)
        path, strength = (
            split_strength(str(whole)) if "strength" in verb(self.command).inputs else (whole, 1.0)
        )
        if path.exists():
            return [item]
        after = "" if path == whole else f":{strength!r}"
        anchor = Path(path.anchor)
        matches = matching(anchor, str(path.relative_to(anchor)))
        found = [match for match in matches if self._meant(match)]
        if not found:
            raise WrongUsage(f"{self.place}: nothing matches {name} = {item!r}")
        return [Rooted(f"{match}{after}") for match in found]

    def _meant(self, match: Path) -> bool:
        # does not follow symbolic links
        absolute = Path(os.path.abspath(match))  # noqa: PTH100
        return not match.name.startswith(".") and absolute not in self.made


@dataclass(frozen=True)
class _Table:
    """One job with its values as in the TOML file."""

    reader: Reader
    values: Mapping[str, Any]

    def job(self, number: int) -> Job:
        self._check_complete()
        reader, command = self.reader, self.reader.command
        given = {name: value for name, value in self.values.items() if name in verb(command).kinds}
        options = {
            name: reader.option(name, value) for name, value in given.items() if name != "output"
        }
        inputs = tuple(self._inputs())
        return Job(
            number,
            reader.place,
            command,
            inputs,
            {**options, "output": self._output(number, inputs, given, options)},
        )

    def _check_complete(self) -> None:
        place, command = self.reader.place, self.reader.command
        for name in verb(command).inputs:
            if name != "strength" and name not in self.values:
                raise WrongUsage(
                    f"{place}: {command} requires {name}",
                    hint=f"add {name}, the path of a file or folder",
                )
        if command == "convert" and not self.values.keys() & {"to", "host", "algo", "dtype"}:
            raise WrongUsage(
                f"{place}: it has no target format", hint="add to, the name of a format, or host"
            )
        if "output" not in self.values:
            names = "-".join(f"{{{name}}}" for name in verb(command).inputs)
            hint = f'add output = "{names}.safetensors", here or under [defaults.{command}]'
            raise WrongUsage(f"{place}: it has no output", hint=hint)

    def _inputs(self) -> Iterator[Input]:
        roles = verb(self.reader.command).inputs
        for role in roles:
            if role == "adapter" and "strength" in roles:
                yield from self._adapters()
            elif role != "strength":
                yield Input(role, self.reader.path(role, self.values[role]))

    def _adapters(self) -> Iterator[Input]:
        """Yield the adapters, each with its strength times that of the job."""
        factor = self.reader.number("strength", self.values.get("strength", 1.0))
        value = self.values["adapter"]
        for item in value if isinstance(value, list) and value else [value]:
            path, strength = split_strength(str(self.reader.path("adapter", item)))
            yield Input("adapter", path, factor * strength)

    def _output(
        self,
        number: int,
        inputs: tuple[Input, ...],
        given: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Path:
        """Fill the output template: sizes as the recipe writes them, paths by their stems."""
        command = self.reader.command
        names: dict[str, Any] = {
            name: verb(command).default(name) for name in verb(command).kinds if name != "output"
        }
        for name, value in options.items():
            names[name] = stem(value) if isinstance(value, Path) else given[name]
        names |= {"number": number, "command": command}
        for role in verb(command).inputs:
            if role != "strength":
                names[role] = "+".join(stem(item.path) for item in inputs if item.role == role)
        strengths = list(
            dict.fromkeys(item.strength for item in inputs if item.strength is not None)
        )
        if strengths:
            names["strength"] = (
                strengths[0] if len(strengths) == 1 else "+".join(f"{s:g}" for s in strengths)
            )
        template = self.reader.text("output", self.values["output"])
        return inside(self.reader.root, filled(template, names, self.reader.place))


def _check_apart(jobs: tuple[Job, ...]) -> None:
    """Check that no two jobs write one file and none reads the output of another."""
    writers: dict[str, Job] = {}
    for job in jobs:
        other = writers.setdefault(_whole(job.output), job)
        if other is not job:
            hint = "add what differs to the name, such as {adapter}, {strength} or {number}"
            raise WrongUsage(f"{other.place} and {job.place} both write {job.output}", hint=hint)
    for job in jobs:
        for path in job.reads():
            maker = writers.get(_whole(path))
            if maker is not None:
                hint = "jobs run in any order; use a second recipe for jobs that depend on others"
                raise WrongUsage(f"{job.place} reads what {maker.place} writes: {path}", hint=hint)


def _whole(path: Path) -> str:
    """Normalise a path; paths that differ only in case are one file on Windows and macOS."""
    # does not follow symbolic links
    return os.path.abspath(path).casefold()  # noqa: PTH100
