"""batch: run the jobs of a recipe, each once."""

from __future__ import annotations

from adaptkit.ops.batch.run import Options, Plan, Preview, Report, Result, plan, preview, run

__all__ = ["Options", "Plan", "Preview", "Report", "Result", "plan", "preview", "run"]
