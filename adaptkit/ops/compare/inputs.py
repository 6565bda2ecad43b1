"""The two files of a comparison, opened as adapters or checkpoints of one family."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.adapter import Adapter, open_adapter_source
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import is_adapter
from adaptkit.errors import AdaptkitError, ShapeMismatch, UnknownAdapter
from adaptkit.meaning import refuse_errors
from adaptkit.ops.difference.pairing import open_pair

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.files.source import TensorSource

__all__ = ["Argument", "Given", "Inputs", "open_inputs"]

# a file, or a file and the strength of its adapter
Argument = str | PathLike[str] | tuple[str | PathLike[str], float]


@dataclass(frozen=True)
class Given:
    """An adapter and the factor of its ΔW."""

    adapter: Adapter
    strength: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """Adapters A and B with an optional base, or adapter A and two checkpoints."""

    a: Given
    b: Given | None
    base: Checkpoint | None
    tuned: Checkpoint | None = None

    def close(self) -> None:
        """Close all files."""
        for given in (self.a, self.b):
            if given is not None:
                given.adapter.close()
        for checkpoint in (self.base, self.tuned):
            if checkpoint is not None:
                checkpoint.close()


@dataclass(frozen=True)
class _File:
    path: Path
    strength: float
    source: TensorSource
    config: Mapping[str, object] | None
    # --family and --format
    names: tuple[str | None, str | None]
    alpha: str | None = None

    @property
    def is_adapter(self) -> bool:
        return is_adapter(self.source.infos)

    def read(self) -> Adapter:
        """Read the adapter."""
        return self._read(self.names[0])

    def named_by(self, base: Checkpoint) -> Adapter:
        """Open the adapter with the module names of a checkpoint of an unknown family."""
        self.source.close()
        return Adapter.open_as(self.path, base.family, format=self.names[1], alpha=self.alpha)

    def followed(self, adapter: Adapter, family: str) -> Adapter:
        """Return the adapter as one of this family, if its names are ambiguous."""
        alike = adapter.family.name != family and family in adapter.detection.alternatives
        return self._read(family) if alike else adapter

    def _read(self, family: str | None) -> Adapter:
        try:
            found = Adapter.understand(
                self.source, self.config, family=family, format=self.names[1], alpha=self.alpha
            )
            refuse_errors(found.problems, self.path)
            return found
        except AdaptkitError as error:
            raise error.at(file=self.path) from None


def open_inputs(
    a: Argument,
    b: Argument,
    base: Path | None,
    *,
    family: str | None = None,
    format: str | None = None,
    alpha: str | None = None,
) -> Inputs:
    """Read the headers; raise ShapeMismatch if the families differ.

    A file of ambiguous family follows the base, or else A, or else B.
    """
    with ExitStack() as opened:
        files = []
        for argument in (a, b):
            given, strength = argument if isinstance(argument, tuple) else (argument, 1.0)
            path = Path(given)
            source, config = open_adapter_source(path)
            opened.callback(source.close)
            files.append(_File(path, strength, source, config, (family, format), alpha))
        # stable: an adapter goes before a checkpoint
        first, second = sorted(files, key=lambda file: not file.is_adapter)
        if not first.is_adapter:
            raise UnknownAdapter(
                f"neither {first.path.name} nor {second.path.name} is an adapter",
                hint="omit --base to compare two checkpoints",
            )
        inputs = (
            _adapters(first, second, base, opened)
            if second.is_adapter
            else _merged(first, second, base, opened)
        )
        opened.pop_all()
    return inputs


def _adapters(first: _File, second: _File, path: Path | None, opened: ExitStack) -> Inputs:
    a, b, base = first.read(), second.read(), None
    if path is not None:
        base = opened.enter_context(Checkpoint.open(path, family=first.names[0]))
        a, b = first.followed(a, base.family.name), second.followed(b, base.family.name)
    b = second.followed(b, a.family.name)
    a = first.followed(a, b.family.name)
    _check_family(b, a)
    if base is not None:
        _check_family(a, base)
        a, b = base.adapted(a), base.adapted(b)
    a, b = a.with_dots(b.family), b.with_dots(a.family)
    return Inputs(Given(a, first.strength), Given(b, second.strength), base)


def _merged(adapter: _File, checkpoint: _File, path: Path | None, opened: ExitStack) -> Inputs:
    if path is None:
        raise AdaptkitError(
            "a checkpoint compares only with the checkpoint that it was made from",
            hint="pass that checkpoint as --base",
            file=checkpoint.path,
        )
    if checkpoint.strength != 1.0:
        raise AdaptkitError(
            "a checkpoint takes no strength",
            hint="pass the strength with the adapter",
            file=checkpoint.path,
        )
    checkpoint.source.close()
    try:
        base, tuned = open_pair(path, checkpoint.path, checkpoint.names[0])
    except ShapeMismatch as error:
        error.hint = (
            "--base must be the checkpoint that the other one was made from; see `adaptkit "
            "inspect` on both"
        )
        raise
    opened.callback(base.close)
    opened.callback(tuned.close)
    a = adapter.followed(adapter.read(), base.family.name) if base.known else adapter.named_by(base)
    _check_family(a, base)
    a = base.adapted(a)
    return Inputs(Given(a, adapter.strength), None, base, tuned)


def _check_family(one: Adapter, other: Adapter | Checkpoint) -> None:
    if one.family.name != other.family.name:
        raise ShapeMismatch(
            f"this adapter is for {one.family.title}, but {other.source.path.name} is for "
            f"{other.family.title}",
            hint="pass files of one family; see `adaptkit inspect` on both",
            file=one.source.path,
        )
