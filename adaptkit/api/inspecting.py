"""Look at many files in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from adaptkit.ops import inspect as op
from adaptkit.ops.stages import logged

if TYPE_CHECKING:
    from os import PathLike

    from adaptkit.ops.inspect import Report
    from adaptkit.ops.stages import Progress

__all__ = ["Inspected", "inspect"]


class Inspected(Sequence["Report"]):
    """The reports of files, in their order."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = list(reports)

    @overload
    def __getitem__(self, index: int) -> Report: ...
    @overload
    def __getitem__(self, index: slice) -> list[Report]: ...
    def __getitem__(self, index: int | slice) -> Report | list[Report]:
        return self._reports[index]

    def __len__(self) -> int:
        return len(self._reports)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The records as `inspect --json` prints them: rows for a table."""
        return [report.to_dict() for report in self._reports]

    def __repr__(self) -> str:
        broken = sum(report.broken for report in self._reports)
        return f"Inspected({len(self)} files, {broken} broken)"


def inspect(
    *paths: str | PathLike[str], progress: Progress | None = None, **options: Any
) -> Inspected:
    """Identify the files of paths, folders and globs (`adaptkit inspect`)."""
    files = list(op.expand(paths))
    with logged("inspect", progress) as told:
        return Inspected(op.survey(files, op.Options(**options), told))
