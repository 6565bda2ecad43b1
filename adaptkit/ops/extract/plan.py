"""extract: what is fitted and how, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.detect import chosen, formats
from adaptkit.errors import NoSuchName, NothingToDo, WrongUsage
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import KeyMap, algorithms
from adaptkit.ops.adapter_file.writer import check_adapter_output
from adaptkit.ops.difference.pairing import Pair, Pairing, Wanted, open_pair
from adaptkit.ops.difference.probe import Probe
from adaptkit.ops.extract.fit import FitRecipe
from adaptkit.ops.ranks.options import Ranked, asked, largest, policy
from adaptkit.ops.shared import (
    Unused,
    default_output,
    refuse_unused,
    stored_dtype,
)
from adaptkit.steps import Step, check_memory, peak_memory

if TYPE_CHECKING:
    from pathlib import Path

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.ranks.policies import Policy

__all__ = ["MAX_RANK", "Options", "Plan", "plan"]


DEFAULT_RANK = 32


DEFAULT_FACTOR = 8


BLOCKS = 6_000_000  # bytes that reading a weight in blocks of rows takes


MAX_RANK = 128  # of the ladder from which a rule chooses, unless --max-rank says otherwise


@dataclass(frozen=True)
class Options(Ranked):
    """What to fit.

    Without a rank rule: rank 32 for LoRA, a full second factor for LoKr. `factor` None: the one that the difference was made
    with, where that is recognised, else 8. `alpha` is stored instead of the rank; `vectors`: carry changed biases and norms
    exactly (None: with `full` only; several hosts refuse such keys beside a LoRA or LoKr).
    """

    algo: str = "lora"
    factor: int | None = None
    decompose_both: bool = False
    alpha: float | None = None
    clamp_quantile: float | None = None
    to: str = "kohya"
    svd: str = "auto"
    vectors: bool | None = None
    ema: bool = False


@dataclass(frozen=True)
class Plan:
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

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints; sizes are upper bounds, since unchanged layers are left out."""
        fitted = [job for job in self.jobs if job.algorithm]
        return {
            "output": str(self.output),
            "family": self.base.family.name,
            "format": self.keys.format.name,
            "algorithm": self.options.algo,
            "modules": len(fitted),
            "bytes_in": sum(
                self.base.stored_bytes(j.base) + self.tuned.stored_bytes(j.tuned) for j in self.jobs
            ),
            "bytes_out_at_most": sum(_stored_bytes(job, self.options) for job in fitted),
            "peak_memory": peak_memory(self.steps, self.options.memory),
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


def plan(base: Path, tuned: Path, options: Options) -> Plan:
    """Pair the checkpoints by target and decide what is fitted; reads headers only, and fails here if anything can."""
    rule = _check(options)
    folder = formats()[options.to].alpha is Alpha.CONFIG
    output = options.output or default_output(tuned, options.algo, folder=folder)
    check_adapter_output(output, folder=folder, overwrite=options.overwrite)
    first, second = open_pair(base, tuned, options.family, ema=options.ema)
    keys = first.keys(formats()[options.to])
    vectors = options.algo == "full" if options.vectors is None else options.vectors
    pairing = Pairing(first, second, keys, Wanted(options.algo, vectors, options))
    jobs = pairing.pairs()
    if not any(job.algorithm for job in jobs):
        raise NothingToDo("no layer of these checkpoints is selected", hint="see --only and --skip")
    refuse_unused(pairing.lost, options.allow_unused, tuned)
    steps = tuple(step_of(job, first, second, options, streamed=True) for job in jobs)
    check_memory(steps, options.memory)
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
    )


def _check(options: Options) -> Policy | None:
    kinds = {name for name, kind in algorithms().items() if kind.extractable}
    if options.algo not in kinds | {"auto"}:
        raise NoSuchName.among("algorithm for extraction", options.algo, kinds | {"auto"})
    stored_dtype(options.dtype, "F32")
    chosen("format", formats(), options.to)
    rule = asked(options)
    if options.algo == "auto" and rule not in ("size", "error"):
        raise WrongUsage(
            "--algo auto chooses within a size or an error", hint="give --size or --error"
        )
    if options.algo == "full" and rule is not None:
        raise WrongUsage(
            "a full difference has no rank",
            hint="leave the rank rule out, or use --algo lora or auto",
        )
    if options.alpha is not None and (
        options.algo != "lora" or rule not in ("rank", None) or options.alpha <= 0
    ):
        raise WrongUsage("--alpha goes with --algo lora and --rank, and is above 0")
    if options.clamp_quantile is not None and (
        options.algo != "lora" or not 0 < options.clamp_quantile <= 1
    ):
        raise WrongUsage("--clamp-quantile goes with --algo lora, and is above 0 and at most 1")
    if options.decompose_both and (options.algo != "lokr" or rule != "rank"):
        raise WrongUsage("--decompose-both goes with --algo lokr and --rank")
    if options.factor is not None and options.factor < 1:
        raise WrongUsage(f"--factor must be at least 1, not {options.factor}")
    return policy(options)


def has_ladder(options: Options) -> bool:
    """Whether ranks are chosen once all layers are known."""
    return asked(options) not in ("rank", None)


def _rank(job: Pair, options: Options) -> int | None:
    """The rank to fit at (with a ladder: the highest); the layer may allow less. None: the kind's fullest form."""
    if job.algorithm == "full":
        return None
    convolution = any(n > 1 for n in job.shape[2:])
    if has_ladder(options):
        return min(options.max_rank or MAX_RANK, *job.matrix)
    rank = largest(options, convolution=convolution)
    if options.rank is None and job.algorithm == "lora":
        rank = DEFAULT_RANK if rank is None else min(rank, DEFAULT_RANK)
    return None if rank is None else min(rank, *job.matrix)


def recipes_of(job: Pair, options: Options, probe: Probe) -> tuple[FitRecipe, ...]:
    """How a layer is fitted; nothing where it is only compared."""
    kind, rank, ladder = job.algorithm, _rank(job, options), has_ladder(options)
    if kind is None:
        return ()
    if kind == "full":
        return (FitRecipe("full"),)
    factor = options.factor or probe.factor or DEFAULT_FACTOR
    lora = FitRecipe(
        "lora", rank, ladder, svd=options.svd, alpha=options.alpha, quantile=options.clamp_quantile
    )
    if kind == "auto":
        return (
            lora,
            FitRecipe("lokr", rank, ladder=True, factor=factor),
            FitRecipe("full", ladder=True),
        )
    if kind == "lora":
        return (lora,)
    return (FitRecipe("lokr", rank, ladder, factor, both=options.decompose_both),)


def _stored_bytes(job: Pair, options: Options) -> int:
    """At most how many bytes this slot takes in the output."""
    size = 4 if job.dtype == "F32" else 2
    rows, columns = job.matrix
    rank = _rank(job, options)
    if job.algorithm == "lora" and rank is not None:
        return rank * (rows + columns) * size + 4
    return rows * columns * size + 4


def step_of(
    job: Pair, base: Checkpoint, tuned: Checkpoint, options: Options, *, streamed: bool
) -> Step[Pair]:
    """`streamed`: on a CPU, where weights are subtracted as they are read."""
    rows, columns = job.matrix
    dense, rank = 4 * rows * columns, _rank(job, options) or DEFAULT_FACTOR
    # ΔW in float32; a second matrix of its size (LoKr rearranges it, full copies it, auto keeps it); the Krylov space
    copies = {"lora": 1, "auto": 4}.get(job.algorithm or "", 2)
    working = dense * copies + 4 * (rows + columns + min(rows, columns)) * 8 * rank
    sides = (base, job.base, not streamed), (tuned, job.tuned, not streamed or has_ladder(options))
    stored = sum(
        c.nbytes(p) if whole or not c.streams(p) else min(c.nbytes(p), BLOCKS)
        for c, p, whole in sides
    )
    shape = (
        job.shape,
        job.dtype,
        job.algorithm,
        job.role,
        base.source.infos[job.base[0].name].dtype,
    )
    return Step(job, shape, stored + working, tuned.source.order(job.tuned[0].name))
