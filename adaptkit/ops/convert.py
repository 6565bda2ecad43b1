"""convert: the same adapter in another key format, for a host, or in another algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.detect import chosen, formats
from adaptkit.errors import AdaptkitError
from adaptkit.formats.contract import Alpha
from adaptkit.ops.ranks.options import asked, policy, spelled
from adaptkit.ops.rewrite.plan import Into, Recast, RecastOptions, chosen_entries, open_all
from adaptkit.ops.rewrite.planner import recast
from adaptkit.ops.rewrite.report import Report
from adaptkit.ops.rewrite.run import check_peft, run
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import default_output
from adaptkit.ops.verb import Verb

if TYPE_CHECKING:
    from os import PathLike

    from adaptkit.adapter import Adapter

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run"]

Plan = Recast


@dataclass(frozen=True)
class Options(RecastOptions):
    """The format to write (`to`), or the host that is to load it (`host`)."""

    to: str | None = None
    host: str | None = None


def plan(path: str | PathLike[str], options: Options) -> Recast:
    """Find the place of every module in the new format.

    Reads headers only. Anything that can fail fails here.
    """
    rule = asked(options)
    path = Path(path)
    (adapter,) = open_all([path], options)
    try:
        into, notes = _target(adapter, options)
        output = options.output or default_output(
            path, _said(options, into, adapter), folder=into.config
        )
        chosen_ranks = None if rule is None else policy(options)
        made = recast(
            "convert", (adapter,), into, output, options, policy=chosen_ranks, notes=notes
        )
        check_peft(made)
    except AdaptkitError:
        adapter.close()
        raise
    return _with_hint(made, options)


def _with_hint(made: Recast, options: Options) -> Recast:
    """The plan, with a note if the host loads the file as it is."""
    if options.host is None or made.notes or made.counts().keys() != {"unchanged"}:
        return made
    from adaptkit.hosts import named

    title, keys = named(options.host).title, made.keys.format.name
    return replace(
        made, notes=(f"{title} loads {keys} keys as they are: nothing was to be renamed.",)
    )


def _said(options: Options, into: Into, adapter: Adapter) -> str:
    """What the name of the output says: the format, or what else is done."""
    if into.format != adapter.format.name or options.to or options.host:
        return into.format
    if asked(options) is not None:
        return spelled(options)
    changed = options.algo or (None if options.dtype == "keep" else options.dtype)
    return changed or "selected"


def _target(adapter: Adapter, options: Options) -> tuple[Into, tuple[str, ...]]:
    if options.to is not None:
        chosen("format", formats(), options.to)
        return Into.plain(options.to), ()
    if options.host is None:
        return Into.plain(adapter.format.name), ()
    from adaptkit.hosts import recipe

    selection = Selection(options.only, options.skip, adapter.family)
    written = replace(adapter, entries=chosen_entries(adapter, selection))
    found = recipe(options.host, written if written.entries else adapter, options.algo)
    fold = found.fold_alpha or formats()[found.format].alpha is Alpha.NONE
    return Into(found.format, fold, found.dialect), found.warnings


VERB = Verb("convert", ("adapter",), Options, plan, run)
