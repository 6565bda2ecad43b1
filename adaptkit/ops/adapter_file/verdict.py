"""Which hosts load an adapter that was written: the judgement of `inspect`, on the written file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["loading", "verdicts"]


def verdicts(adapter: Adapter) -> dict[str, Any]:
    """Whether each host loads the file (`loads_in`; None: not measured), and why not (`why`)."""
    from adaptkit.hosts import judge

    found = judge(adapter)
    return {
        "loads_in": {name: verdict.loads for name, verdict in found.items()},
        "why": {name: verdict.why for name, verdict in found.items() if verdict.why},
    }


def loading(output: Path, family: str | None) -> dict[str, Any]:
    """The verdicts on a file that a verb wrote; `family` None means one without a table.

    A file that cannot be read as an adapter has no verdict: whatever was written stays, and its
    report too.
    """
    try:
        with Adapter.open(output, family=family) as written:
            return verdicts(written)
    except AdaptkitError:
        return {}
