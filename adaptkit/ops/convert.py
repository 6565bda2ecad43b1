"""convert: the same adapter in another key format, for a host, or in another algorithm."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.detect import chosen, formats
from adaptkit.errors import AdaptkitError, NotRepresentable, WrongUsage
from adaptkit.files.leftovers import forget, hidden
from adaptkit.formats.contract import Alpha
from adaptkit.names import BIAS
from adaptkit.ops.adapter_file.packed import check_packing, pack_file, packed_dtype
from adaptkit.ops.adapter_file.verdict import loading
from adaptkit.ops.ranks.options import asked, policy, spelled
from adaptkit.ops.rewrite.plan import Into, Recast, RecastOptions, chosen_entries, open_all
from adaptkit.ops.rewrite.planner import recast
from adaptkit.ops.rewrite.report import Report
from adaptkit.ops.rewrite.run import check_peft
from adaptkit.ops.rewrite.run import run as recasted
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import DTYPES, default_output
from adaptkit.ops.verb import Verb

if TYPE_CHECKING:
    from os import PathLike

    from adaptkit.adapter import Adapter
    from adaptkit.ops.rewrite.plan import Task
    from adaptkit.ops.stages import Progress

__all__ = ["VERB", "Options", "Plan", "Report", "plan", "run"]

Plan = Recast

PACKED = "nunchaku"  # a layout of plain factors, and so no format of a table


@dataclass(frozen=True)
class Options(RecastOptions):
    """The format to write (`to`), or the host that is to load it (`host`)."""

    to: str | None = None
    host: str | None = None


def plan(path: str | PathLike[str], options: Options) -> Recast:
    """Find the place of every module in the new format.

    Reads headers only. Anything that can fail fails here.
    """
    if (options.to or "").lower() == PACKED:
        return _to_be_packed(path, options)
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


def _to_be_packed(path: str | PathLike[str], options: Options) -> Recast:
    """The plan of the plain file that nunchaku's is packed from, in the dtype of its base."""
    if options.base is None:
        raise WrongUsage(
            "--to nunchaku needs the quantised model that the adapter is for: --base CHECKPOINT",
            hint="nunchaku 0.2 and newer packs any LoRA itself: --to diffusers",
        )
    base, names = options.base, {value: name for name, value in DTYPES.items()}
    dtype = names[packed_dtype(base)]
    if options.dtype not in ("keep", dtype):
        raise WrongUsage(f"the factors of {base.name} are {dtype}, and so must these be")
    output = options.output or default_output(Path(path), PACKED)
    plain = replace(options, to="diffusers", base=None, dtype=dtype, output=output)
    made = plan(path, plain)
    try:
        if made.adapter.family.name != "flux":
            raise NotRepresentable(
                f"nunchaku has a layout for adapters of FLUX.1 alone, not of "
                f"{made.adapter.family.title}",
                file=path,
            )
        for task in made.tasks:
            _check_kind(task)
        check_packing(base, map(made.keys.stem, (task.slot for task in made.tasks)))
    except AdaptkitError:
        made.close()
        raise
    return replace(made, options=replace(plain, to=PACKED, base=base), layout=PACKED)


def _check_kind(task: Task) -> None:
    """NotRepresentable for what nunchaku does not read: it has LoRAs, biases and norms' values."""
    vector = any(entry.facts.vector for entry in task.entries)
    if not (
        task.kind.low_rank or (vector and (task.slot.param == BIAS or task.kind.name == "set"))
    ):
        raise NotRepresentable(
            f"nunchaku's layout holds LoRA, not {task.kind.name}",
            hint="--algo lora writes a LoRA if that is exact",
            tensor=task.label,
        )


def _sets(task: Task) -> bool:
    """Whether a task replaces a weight."""
    return task.kind.forms == (frozenset({"value"}),)


def run(plan: Recast, progress: Progress | None = None) -> Report:
    """Write the file; nunchaku's is packed from a plain one, which is hidden until then."""
    options = plan.options
    if not plan.layout or options.base is None:
        return recasted(plan, progress)
    plain, started = hidden(plan.output), time.perf_counter()
    try:
        hidden_plan = replace(plan, output=plain, options=replace(options, base=None))
        report = recasted(hidden_plan, progress)
        size = pack_file(plain, options.base, plan.output, overwrite=options.overwrite)
    finally:
        plain.unlink(missing_ok=True)
        forget(plain)
    return replace(
        report,
        output=plan.output,
        bytes=size,
        seconds=time.perf_counter() - started,
        notes=tuple(note for note in report.notes if "lora_B.bias" not in note),
        **loading(plan.output, plan.adapter.family.name),
    )


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
