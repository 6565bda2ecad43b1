"""resize: the best adapter of lower rank, computed from the factors alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.errors import AdaptkitError, NothingToDo, WrongUsage
from adaptkit.keymap.kinds import dense_kind
from adaptkit.ops.ranks.options import asked, policy, spelled
from adaptkit.ops.rewrite.plan import Into, Recast, RecastOptions, open_all
from adaptkit.ops.rewrite.planner import open_base, recast
from adaptkit.ops.rewrite.report import Report
from adaptkit.ops.rewrite.run import check_peft, run
from adaptkit.ops.rewrite.weighing import weighing
from adaptkit.ops.shared import default_output
from adaptkit.ops.verb import Verb

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run"]

Plan = Recast


@dataclass(frozen=True)
class Options(RecastOptions):
    """The ranks to keep, by one rule; `algo` changes the algorithm too.

    `weigh` is a checkpoint: `size` then spends ranks by ‖ΔW‖ relative to each layer's own ‖W‖.
    """

    weigh: Path | None = None


def plan(path: str | PathLike[str], options: Options) -> Recast:
    """Plan what every module may become. Reads headers only; anything that can fail fails here."""
    if asked(options) is None:
        raise WrongUsage(
            "no rank rule is given",
            hint="give --rank, --energy, --error, --size or an --sv-* rule",
        )
    if options.algo == dense_kind().name:
        raise WrongUsage(
            f"a {options.algo} difference has no rank",
            hint=f"use `adaptkit convert --algo {options.algo}`",
        )
    if options.weigh is not None and options.size is None:
        raise WrongUsage(
            "--weigh goes with --size",
            hint="the other rules look at each module alone, or promise an error of ΔW",
        )
    chosen = policy(options)
    path = Path(path)
    (adapter,) = open_all([path], options)
    try:
        into = Into.plain(adapter.format.name)
        output = options.output or default_output(path, spelled(options), folder=into.config)
        made = recast("resize", (adapter,), into, output, options, policy=chosen)
        if not any(task.ranked for task in made.tasks):
            kinds = {task.kind for task in made.tasks}
            alone = options.base is not None or all(kind.additive for kind in kinds)
            base = "" if alone else " with --base CHECKPOINT"
            names = ", ".join(sorted(kind.name for kind in kinds))
            raise NothingToDo(
                f"none of its modules has a rank to cut: {names}",
                hint=f"--algo lora{base} makes what has one",
                file=path,
            )
        check_peft(made)
        return made if options.weigh is None else _weighed(made, options.weigh)
    except AdaptkitError:
        adapter.close()
        raise


def _weighed(made: Recast, path: Path) -> Recast:
    """The plan with the layers that its modules are weighed by."""
    checkpoint = open_base(path, made.adapter)
    try:
        return replace(made, norms=weighing(made.tasks, checkpoint).norms, beside=checkpoint)
    except AdaptkitError:
        checkpoint.close()
        raise


VERB = Verb("resize", ("adapter",), Options, plan, run)
