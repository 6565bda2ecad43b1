"""inspect: identify a file."""

from __future__ import annotations

from adaptkit.ops.inspect.run import Options, Report, expand, run

__all__ = ["Options", "Report", "expand", "run"]
