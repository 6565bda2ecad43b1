"""convert: the same adapter in another key format, for a host, or in another algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.adapter import Adapter
from adaptkit.detect import chosen, formats
from adaptkit.errors import AdaptkitError
from adaptkit.formats.contract import Alpha
from adaptkit.ops.ranks.options import asked, policy
from adaptkit.ops.rewrite.plan import Into, Recast, RecastOptions, chosen_entries
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
    """The format to write (`to`), or the host that is to load it (`host`)."""

    to: str | None = None
    host: str | None = None


def plan(path: Path, options: Options) -> Recast:
    """Find the place of every module in the new format.

    Reads headers only. Anything that can fail fails here.
    """
    rule = asked(options)
    adapter = Adapter.open(
        path, family=options.family, format=options.format, alpha=options.alpha_in
    )
    try:
        into, notes = _target(adapter, options)
        output = options.output or default_output(path, into.format, folder=into.config)
        chosen_ranks = None if rule is None else policy(options)
        made = recast(
            "convert", (adapter,), into, output, options, policy=chosen_ranks, notes=notes
        )
        check_peft(made)
    except AdaptkitError:
        adapter.close()
        raise
    return made


def _target(adapter: Adapter, options: Options) -> tuple[Into, tuple[str, ...]]:
    if options.to is not None:
        chosen("format", formats(), options.to)
        return Into.plain(options.to), ()
    if options.host is None:
        return Into.plain(adapter.format.name), ()
    from adaptkit.hosts import recipe

    written = replace(adapter, entries=chosen_entries(adapter, options))
    found = recipe(options.host, written if written.entries else adapter, options.algo)
    fold = found.fold_alpha or formats()[found.format].alpha is Alpha.NONE
    return Into(found.format, fold, found.dialect), found.warnings


VERB = Verb("convert", ("adapter",), Options, plan, run)
