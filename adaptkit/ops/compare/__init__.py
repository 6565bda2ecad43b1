"""compare: distance of two adapters, or the share of an adapter in a checkpoint."""

from __future__ import annotations

from adaptkit.ops.compare.run import ModuleDistance, Options, Plan, Report, plan, run

__all__ = ["ModuleDistance", "Options", "Plan", "Report", "plan", "run"]
