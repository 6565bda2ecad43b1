"""resize: the best adapter of lower rank, from the factors alone; a LoKr stays a LoKr, everything else becomes a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError, NothingToDo, WrongUsage
from adaptkit.ops.ranks.options import asked, policy, spelled
from adaptkit.ops.rewrite.plan import Into, Recast, RecastOptions
from adaptkit.ops.rewrite.planner import recast
from adaptkit.ops.rewrite.report import Report
from adaptkit.ops.rewrite.run import check_peft, run
from adaptkit.ops.shared import default_output
from adaptkit.ops.verb import Verb

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run"]

Plan = Recast


@dataclass(frozen=True)
class Options(RecastOptions):
    """Which ranks to keep (one rule), perhaps in another algorithm."""


def plan(path: Path, options: Options) -> Recast:
    """Every module and what it may become; reads headers only, and fails here if anything can."""
    if asked(options) is None:
        raise WrongUsage(
            "nothing says which ranks to keep",
            hint="give --rank, --energy, --error, --size or an --sv-* rule",
        )
    if options.algo == "full":
        raise WrongUsage("a full difference has no rank", hint="use `adaptkit convert --algo full`")
    chosen = policy(options)
    adapter = Adapter.open(path, family=options.family, format=options.format)
    try:
        into = Into.plain(adapter.format.name)
        output = options.output or default_output(path, spelled(options), folder=into.config)
        made = recast("resize", (adapter,), into, output, options, policy=chosen)
        if not any(task.ranked for task in made.tasks):
            names = ", ".join(sorted({task.kind.name for task in made.tasks}))
            raise NothingToDo(f"none of its modules has a rank to cut: {names}", file=path)
        check_peft(made)
    except AdaptkitError:
        adapter.close()
        raise
    return made


VERB = Verb("resize", ("adapter",), Options, plan, run)
