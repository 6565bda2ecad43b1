"""merge: add adapters to the weights of a checkpoint."""

from __future__ import annotations

from adaptkit.ops.merge.plan import Options, Plan
from adaptkit.ops.merge.planner import plan
from adaptkit.ops.merge.report import Report
from adaptkit.ops.merge.run import run, run_together
from adaptkit.ops.verb import STRENGTH, Verb

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run", "run_together"]

VERB = Verb("merge", ("base", "adapter", STRENGTH), Options, plan, run, run_together)
