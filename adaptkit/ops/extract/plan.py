"""Plan an extraction: what is fitted and how, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.algorithms.contract import FitSpec
from adaptkit.detect import chosen, formats
from adaptkit.errors import AdaptkitError, NoSuchName, NothingToDo, NotRepresentable, WrongUsage
from adaptkit.formats.contract import Alpha
from adaptkit.keymap.kinds import extractable, taking
from adaptkit.ops.adapter_file.peft_config import only_kind
from adaptkit.ops.adapter_file.writer import check_adapter_output
from adaptkit.ops.difference.look import reading
from adaptkit.ops.difference.pairing import Pair, Pairing, Wanted, open_pair
from adaptkit.ops.difference.probe import steps_of
from adaptkit.ops.difference.working import energies_bytes, svd_bytes
from adaptkit.ops.extract.recipe import FitRecipe
from adaptkit.ops.ranks.options import MAX_RANK, Ranked, asked, largest, policy, rules
from adaptkit.ops.shared import (
    Closing,
    LeftOut,
    Unused,
    chosen_by,
    default_output,
    refuse_unused,
    stored_dtype,
)
from adaptkit.steps import Step, check_memory, peak_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.keymap import KeyMap
    from adaptkit.ops.difference.probe import Probe
    from adaptkit.ops.ranks.rules.contract import Policy

__all__ = ["Options", "Plan", "plan"]


AUTO = "auto"  # instead of an algorithm: the best one for each layer
DEFAULT_FACTOR = 8
DEFAULT_RANK = 32


@dataclass(frozen=True)
class Options(Ranked):
    """What to fit.

    Without a rank rule a LoRA has rank 32, and the second factor of a LoKr is full. `factor` None
    takes the factor that the difference was made with, or 8 if none is recognised. `alpha` is
    stored instead of the rank. `to` is the key format, `host` who is to load the file; without
    both it is the format that most hosts load completely. `vectors` carries changed biases and
    norms exactly; None does so with `full` only, since several hosts refuse such keys beside a
    LoRA or LoKr.
    """

    algo: str = "lora"
    factor: int | None = None
    decompose_both: bool = False
    alpha: float | None = None
    clamp_quantile: float | None = None
    to: str | None = None
    host: str | None = None
    svd: str = "auto"
    vectors: bool | None = None
    ema: bool = False


@dataclass(frozen=True, repr=False)
class Plan(Closing):
    """Everything known before a weight is read."""

    base: Checkpoint
    tuned: Checkpoint
    options: Options
    output: Path
    jobs: tuple[Pair, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[Pair], ...]
    keys: KeyMap
    policy: Policy | None = None
    notes: tuple[str, ...] = ()
    selection: LeftOut | None = None
    probing: tuple[Step[Pair], ...] = ()  # the layers that are looked at first

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--dry-run` prints it.

        Sizes are upper bounds, since unchanged layers are left out.
        """
        fitted = [job for job in self.jobs if job.algorithm]
        return {
            "output": str(self.output),
            "family": self.base.family.name,
            "format": self.keys.format.name,
            "algorithm": self.options.algo,
            "modules": len(fitted),
            **chosen_by(self.selection),
            "bytes_in": sum(
                self.base.stored_bytes(j.base) + self.tuned.stored_bytes(j.tuned) for j in self.jobs
            ),
            "bytes_out_at_most": sum(_stored_bytes(job, self.options) for job in fitted),
            "peak_memory": max(
                peak_memory(self.steps, self.options.memory),
                peak_memory(self.probing, self.options.memory),
            ),
            "device": self.options.device,
            "unused": [item.to_dict() for item in self.unused],
            "details": [
                {
                    "module": j.label,
                    "algorithm": j.algorithm,
                    "rank": _rank(j, self.options),
                    "shape": list(j.shape),
                }
                for j in fitted
            ],
        }

    def close(self) -> None:
        """Close both checkpoints."""
        self.base.close()
        self.tuned.close()


def plan(base: str | PathLike[str], tuned: str | PathLike[str], options: Options) -> Plan:
    """Pair the checkpoints by target and decide what is fitted.

    Reads headers only. Anything that can fail fails here.
    """
    base, tuned = Path(base), Path(tuned)
    try:
        rule = _check(options)
    except AdaptkitError as error:
        raise error.at(file=tuned) from None
    first, second = open_pair(base, tuned, options.family, ema=options.ema)
    try:
        return _planned(first, second, tuned, _with_format(options, first), rule)
    except AdaptkitError:
        first.close()
        second.close()
        raise


def _with_format(options: Options, base: Checkpoint) -> Options:
    """The options with the format to write: given, that of a host, or that of most hosts."""
    from adaptkit.hosts import format_for, usual_format

    if options.to is not None:
        return options
    if options.host is not None:
        return replace(options, to=format_for(options.host, base.family))
    return replace(options, to=usual_format(base.family.name))


def _planned(
    first: Checkpoint, second: Checkpoint, tuned: Path, options: Options, rule: Policy | None
) -> Plan:
    assert options.to is not None
    form = formats()[options.to]
    if options.alpha is not None and form.alpha is Alpha.NONE:
        raise WrongUsage(
            f"--alpha: the {options.to} format stores no alpha",
            hint="omit --alpha, or choose a format that stores it; see `adaptkit formats`",
        )
    folder = form.alpha is Alpha.CONFIG
    output = options.output or default_output(tuned, options.algo, folder=folder)
    check_adapter_output(output, folder=folder, overwrite=options.overwrite)
    keys = first.keys(form)
    vectors = _dense(options.algo) if options.vectors is None else options.vectors
    pairing = Pairing(first, second, keys, Wanted(options.algo, vectors, options))
    jobs = pairing.pairs()
    pairing.selection.check("these checkpoints")
    if not any(job.algorithm for job in jobs):
        raise _nothing(jobs, options)
    refuse_unused(pairing.lost, options.allow_unused, tuned)
    steps = tuple(step_of(job, first, second, options, streamed=True) for job in jobs)
    probing = tuple(steps_of(first, second, jobs))
    check_memory((*steps, *probing), options.memory)
    return Plan(
        first,
        second,
        options,
        output,
        jobs,
        tuple(pairing.lost + pairing.left),
        steps,
        keys,
        rule,
        pairing.notes,
        pairing.selection.left_out,
        probing,
    )


def _nothing(jobs: Sequence[Pair], options: Options) -> AdaptkitError:
    """Why there is nothing to fit: nothing is selected, or no layer has a place in the format."""
    if not jobs:
        hint = "see --only and --skip"
        return NothingToDo("no layer of these checkpoints is selected", hint=hint)
    first = next((job for job in jobs if len(job.shape) > 1), jobs[0])
    return NotRepresentable(
        f"the {options.to} format holds none of the {len(jobs)} layers: {first.why}",
        hint="choose another --to; `adaptkit formats` lists them",
        tensor=first.label,
    )


def _check(options: Options) -> Policy | None:
    kinds = {*extractable(), AUTO}
    if options.algo not in kinds:
        raise NoSuchName.among("algorithm for extraction", options.algo, kinds)
    stored_dtype(options.dtype, "F32")
    if options.to is not None:
        chosen("format", formats(), options.to)
        if options.host is not None:
            raise WrongUsage("--to and --for exclude each other", hint="give one of them")
        if formats()[options.to].alpha is Alpha.CONFIG:
            wanted = extractable() if options.algo == AUTO else {options.algo}
            only_kind({extractable()[name] for name in wanted}, biased=False)
    rule = asked(options)
    if options.algo == AUTO and (rule is None or not rules()[rule].total):
        raise WrongUsage(
            "--algo auto chooses within a size or an error", hint="give --size or --error"
        )
    if rule is not None and _dense(options.algo):
        raise WrongUsage(
            f"a {options.algo} difference has no rank",
            hint="omit the rank rule, or use --algo lora or auto",
        )
    _check_kind_options(options, rule)
    if options.factor is not None and options.factor < 1:
        raise WrongUsage(f"--factor must be at least 1, not {options.factor}")
    return policy(options)


def _check_kind_options(options: Options, rule: str | None) -> None:
    """Refuse options that the algorithm does not take, or not with this rule."""
    alpha, quantile = options.alpha, options.clamp_quantile
    if alpha is not None and not (
        _takes(options, "alpha") and not has_ladder(options) and alpha > 0
    ):
        raise WrongUsage(f"--alpha goes with {_algos('alpha')} and --rank, and is above 0")
    if quantile is not None and not (_takes(options, "clamp_quantile") and 0 < quantile <= 1):
        names = _algos("clamp_quantile")
        raise WrongUsage(f"--clamp-quantile goes with {names}, and is above 0 and at most 1")
    if options.decompose_both and not (_takes(options, "decompose_both") and rule == "rank"):
        raise WrongUsage(f"--decompose-both goes with {_algos('decompose_both')} and --rank")


def _takes(options: Options, name: str) -> bool:
    return options.algo in taking(name)


def _algos(option: str) -> str:
    return " or ".join(f"--algo {name}" for name in taking(option))


def _dense(algorithm: str | None) -> bool:
    kind = extractable().get(algorithm or "")
    return kind is not None and kind.dense


def takes_factor(options: Options) -> bool:
    """Whether any kind that is fitted has a factor."""
    return options.algo == AUTO or _takes(options, "factor")


def has_ladder(options: Options) -> bool:
    """Whether ranks are chosen once all layers are known."""
    rule = asked(options)
    return rule is not None and not rules()[rule].fixed


def has_ranks(job: Pair) -> bool:
    """Whether a rank may be chosen for this layer."""
    return job.algorithm is not None and not _dense(job.algorithm)


def _rank(job: Pair, options: Options) -> int | None:
    """The rank to fit at, with a ladder the highest; None for the fullest form of the kind.

    The layer may allow less.
    """
    if _dense(job.algorithm):
        return None
    if has_ladder(options):
        return min(options.max_rank or MAX_RANK, *job.matrix)
    rank = largest(options, convolution=any(n > 1 for n in job.shape[2:]))
    kind = extractable().get(job.algorithm or "")
    if options.rank is None and kind is not None and kind.default_rank is not None:
        rank = kind.default_rank if rank is None else min(rank, kind.default_rank)
    return None if rank is None else min(rank, *job.matrix)


def recipes_of(job: Pair, options: Options, probe: Probe) -> tuple[FitRecipe, ...]:
    """How to fit a layer; empty if it is only compared."""
    if job.algorithm is None:
        return ()
    spec = FitSpec(
        _rank(job, options),
        factor=options.factor or probe.factor or DEFAULT_FACTOR,
        svd=options.svd,
        both=options.decompose_both,
        alpha=options.alpha,
        quantile=options.clamp_quantile,
    )
    if job.algorithm == AUTO:
        return tuple(FitRecipe(kind, spec, ladder=True) for kind in extractable().values())
    kind = extractable()[job.algorithm]
    return (FitRecipe(kind, spec, has_ladder(options) and not kind.dense),)


def _stored_bytes(job: Pair, options: Options) -> int:
    """An upper bound of the bytes that this slot takes in the output."""
    size = 4 if job.dtype == "F32" else 2
    kind, (rows, columns) = extractable().get(job.algorithm or ""), job.matrix
    if kind is None:
        return rows * columns * size + 4
    return kind.fitted_numbers(rows, columns, _rank(job, options)) * size + 4


def _working(job: Pair, options: Options) -> int:
    """Bytes that fitting takes, ΔW included: forms are fitted one after the other."""
    (rows, columns), rank = job.matrix, _rank(job, options)
    dense, half = 4 * rows * columns, job.dtype != "F32"
    beside = [job.swapped * dense]
    for kind in (k for k in extractable().values() if job.algorithm in (AUTO, k.name)):
        if kind.dense:
            beside.append(2 * rows * columns * half)
        elif kind.low_rank:
            beside.append(svd_bytes(rows, columns, rank or DEFAULT_RANK, options.svd))
        elif kind.against_low_rank:
            factor, rule = options.factor or DEFAULT_FACTOR, has_ladder(options)
            most = rows * columns // factor**2 + factor**2
            copies = kind.fit_copies(0 if rule else rank, options.factor)
            beside.append(dense * (copies - 1) + 4 * most)
            beside.append((10 if half else 4) * most)  # fitted, as written and as read
            if not rule:  # a LoRA of as many numbers
                same = most // (rows + columns)
                beside.append(4 * most + energies_bytes(rows, columns, same, rough=True))
    return dense + max(beside)


def step_of(
    job: Pair, base: Checkpoint, tuned: Checkpoint, options: Options, *, streamed: bool
) -> Step[Pair]:
    """The step of one layer. `streamed` on a CPU, which subtracts weights as it reads them."""
    dense = 4 * job.matrix[0] * job.matrix[1]
    # ΔW is there once both are read, or a block of each
    theirs, held = reading(tuned, job.tuned, whole=not streamed or has_ladder(options))
    ours, kept = reading(base, job.base, whole=not streamed)
    needed = max(theirs, held + ours, held + kept + dense, _working(job, options))
    if not streamed:  # on a device both are there to the end
        needed = max(needed, held + kept + _working(job, options))
    shape = (
        job.shape,
        job.dtype,
        job.algorithm,
        job.role,
        job.swapped,
        base.likeness(job.base),
        tuned.likeness(job.tuned),
    )
    return Step(job, shape, needed, tuned.source.order(job.tuned[0].name))
