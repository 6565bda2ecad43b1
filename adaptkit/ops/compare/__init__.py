"""compare: how far apart two adapters are, or how much of one a checkpoint contains."""

from __future__ import annotations

from adaptkit.ops.compare.run import ModuleDistance, Options, Plan, Report, plan, run

__all__ = ["ModuleDistance", "Options", "Plan", "Report", "plan", "run"]
