"""extract: fit the adapter that turns one checkpoint into another."""

from __future__ import annotations

from adaptkit.ops.extract.plan import Options, Plan, plan
from adaptkit.ops.extract.result import Report
from adaptkit.ops.extract.run import run
from adaptkit.ops.verb import Verb

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run"]

VERB = Verb("extract", ("base", "tuned"), Options, plan, run)
