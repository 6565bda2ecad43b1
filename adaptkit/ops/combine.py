"""combine: several adapters in one, exact until a rank is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.detect import chosen, formats
from adaptkit.errors import AdaptkitError, NoSuchName, NothingToDo, WrongUsage
from adaptkit.ops.ranks.options import asked, policy
from adaptkit.ops.rewrite.plan import Into, Mixing, Recast, RecastOptions, open_all
from adaptkit.ops.rewrite.planner import recast
from adaptkit.ops.rewrite.report import Report
from adaptkit.ops.rewrite.run import check_peft, run
from adaptkit.ops.shared import default_output
from adaptkit.ops.verb import STRENGTH, Verb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from adaptkit.adapter import Adapter

__all__ = ["METHODS", "VERB", "Options", "Plan", "Report", "plan", "run"]

Plan = Recast

METHODS = ("sum", "mean", "ties", "dare", "dare-ties", "magnitude")


@dataclass(frozen=True)
class Options(RecastOptions):
    """The `method` that joins the adapters. `sum` is exact; so is `mean` before its rank is cut.

    `mean` divides the weights by their sum, and keeps the highest rank of the inputs unless a rule
    says otherwise. With a `decay` it is the exponential moving average of the inputs, checkpoints
    of one training in their order: m ← decay · m + (1 − decay) · ΔW.

    The other methods keep a share (`density`) of the entries of each ΔW. `to` is the format to
    write, by default that of the first adapter. `into` names the component that each input is for,
    in their order: `transformer` and `transformer_2` put the two experts of Wan 2.2 in one file.
    """

    to: str | None = None
    method: str = "sum"
    density: float | None = None
    seed: int = 0
    into: tuple[str, ...] = ()
    decay: float | None = None


def plan(inputs: Sequence[tuple[str | PathLike[str], float]], options: Options) -> Recast:
    """Plan what becomes of every module of any input.

    `inputs` are adapters with their weights: ΔW = Σ weight · ΔW of each. Reads headers only.
    Anything that can fail fails here.
    """
    mixing = _mixing(options)
    if options.to is not None:
        chosen("format", formats(), options.to)
    if options.into and len(options.into) != len(inputs):
        raise WrongUsage(
            f"--into names {len(options.into)} components for {len(inputs)} adapters",
            hint="give one for each, in their order: --into transformer,transformer_2",
        )
    given = _averaged(inputs, options)
    counted = [(Path(path), weight) for path, weight in given if weight != 0.0]
    if not counted:
        raise NothingToDo(
            "every weight is 0", hint="write the weight after the name: a.safetensors:0.5"
        )
    last = inputs[-1][0]
    paths, weights = [path for path, _ in counted], [weight for _, weight in counted]
    adapters = open_all(paths, options)
    try:
        if options.into:
            parts = [
                p for p, (_, weight) in zip(options.into, inputs, strict=True) if weight != 0.0
            ]
            adapters = tuple(one.as_part(p) for one, p in zip(adapters, parts, strict=True))
        into = Into.plain(options.to or adapters[0].format.name)
        output = options.output or default_output(Path(last), "combined", folder=into.config)
        ranks = policy(_keeping_rank(adapters, options))
        left = [
            f"{path}: its weight is 0, so it is not in the output."
            for path, weight in inputs
            if weight == 0.0
        ]
        made = recast(
            "combine",
            adapters,
            into,
            output,
            options,
            weights=weights,
            policy=ranks,
            mixing=mixing,
            notes=left,
        )
        check_peft(made)
    except AdaptkitError:
        for adapter in adapters:
            adapter.close()
        raise
    return made


def _averaged(
    inputs: Sequence[tuple[str | PathLike[str], float]], options: Options
) -> Sequence[tuple[str | PathLike[str], float]]:
    """The inputs with the weights of a mean, which add up to 1."""
    decay = options.decay
    if options.method != "mean":
        if decay is not None:
            raise WrongUsage("--decay goes with --method mean")
        return inputs
    weights = [weight for _, weight in inputs]
    if decay is not None:
        if not 0.0 < decay < 1.0:
            raise WrongUsage(f"--decay must be between 0 and 1, not {decay:g}")
        if any(weight != 1.0 for weight in weights):
            raise WrongUsage("--decay sets the weights", hint="leave out those after the names")
        last = len(weights) - 1
        weights = [decay ** (last - n) * (1.0 - decay if n else 1.0) for n in range(last + 1)]
    total = sum(weights)
    if total <= 0.0:
        raise WrongUsage(
            f"the weights of a mean add up to {total:g}", hint="--method sum takes any"
        )
    return [(path, weight / total) for (path, _), weight in zip(inputs, weights, strict=True)]


def _keeping_rank(adapters: Sequence[Adapter], options: Options) -> Options:
    """The options of a mean, which has the ranks of its inputs unless a rule is given."""
    if options.method != "mean" or asked(options) is not None:
        return options
    found: dict[bool, int] = {}
    for adapter in adapters:
        for entry in adapter.entries.values():
            if entry.kind.low_rank and entry.facts.rank is not None:
                window = any(n > 1 for n in entry.facts.kernel or ())
                found[window] = max(found.get(window, 0), entry.facts.rank)
    if not found:
        return options
    rank = found.get(False, found.get(True))
    return replace(options, rank=rank, conv_rank=found.get(True))


def _mixing(options: Options) -> Mixing | None:
    if options.method not in METHODS:
        raise NoSuchName.among("method", options.method, METHODS)
    if options.method in ("sum", "mean"):
        if options.density is not None:
            raise WrongUsage(
                f"--density has no meaning for a {options.method}",
                hint="choose --method ties, dare or magnitude",
            )
        return None
    density = 0.5 if options.density is None else options.density
    if not 0.0 < density <= 1.0:
        raise WrongUsage(f"--density must be above 0 and at most 1, not {density:g}")
    return Mixing(options.method, density, options.seed)


VERB = Verb("combine", ("adapter", STRENGTH), Options, plan, run)
