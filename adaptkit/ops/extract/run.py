"""extract: the adapter that turns one checkpoint into another, as nearly as its kind and rank allow."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.algorithms.contract import ALPHA
from adaptkit.detect import chosen, formats
from adaptkit.engine import Step, check_memory, peak_memory
from adaptkit.errors import NoSuchName, NothingToDo, NotRepresentable, WrongUsage
from adaptkit.files.header import TensorSpec
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import KeyMap, algorithms
from adaptkit.ops.ranks.forms import Layer, Pick, choose, choose_any
from adaptkit.ops.shared import (
    Progress,
    Unused,
    WriterReport,
    default_output,
    refuse_unused,
    stored_dtype,
    torch_dtype,
)
from adaptkit.ops.extract.fit import Fitted, Fitter, Form, Recipe
from adaptkit.ops.difference.pairing import Job, Pairing, Wanted, open_pair
from adaptkit.ops.adapter_file.peft_config import Module, adapter_file, check_adapter_output, factor_rows
from adaptkit.ops.difference.probe import Probe, probe
from adaptkit.ops.ranks.options import Ranked, asked, largest, policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.files.sink import Spool, TensorSink
    from adaptkit.ops.ranks.policies import Policy

__all__ = ["Options", "Plan", "Report", "plan", "run"]

DEFAULT_RANK = 32
DEFAULT_FACTOR = 8
BLOCKS = 6_000_000  # bytes that reading a weight in blocks of rows takes
MAX_RANK = 128  # of the ladder from which a rule chooses, unless --max-rank says otherwise
SPOOL = 64_000_000  # bytes of results held in memory before they go to a temporary file
HEADER = 76  # bytes that the file's header takes per tensor beside its name: for comparing ranks; the size is counted exactly
GUESSED = (
    32  # swept over all SD shapes with lycoris-lora 4.1.3: every factor below is guessed right
)
LITTLE = 0.5  # a LoKr that keeps less of ‖ΔW‖² than this is worth a word


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
    jobs: tuple[Job, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[Job], ...]
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


@dataclass(frozen=True, kw_only=True)
class Report(WriterReport):
    """What was written, how much of the difference it captures, and what a user should know."""

    family: str
    format: str
    algorithm: str
    captured: float
    unchanged: int
    lora_same_size: float | None = None
    notes: tuple[str, ...] = ()
    left_out: int = 0
    noise_floor: float = 0.0
    made_by: Mapping[str, Any] | None = None
    gap: float | None = None
    noise_ranks: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "format": self.format,
            "algorithm": self.algorithm,
            "captured": self.captured,
            "unchanged": self.unchanged,
            "left_out": self.left_out,
            "noise_floor": self.noise_floor,
            "made_by": None if self.made_by is None else dict(self.made_by),
            "notes": list(self.notes),
        }
        if self.noise_ranks is not None:
            extra["ranks_below_noise"] = self.noise_ranks
        if self.gap is not None:
            extra["optimality_gap"] = self.gap
        if self.lora_same_size is not None:
            extra["captured_by_lora_of_same_size"] = self.lora_same_size
        return {**super().to_dict(), **extra}


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
    jobs = tuple(pairing.jobs())
    if not any(job.algorithm for job in jobs):
        raise NothingToDo("no layer of these checkpoints is selected", hint="see --only and --skip")
    refuse_unused(pairing.lost, options.allow_unused, tuned)
    steps = tuple(_step(job, first, second, options, streamed=True) for job in jobs)
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


def _ladder(options: Options) -> bool:
    """Whether ranks are chosen once all layers are known."""
    return asked(options) not in ("rank", None)


def _rank(job: Job, options: Options) -> int | None:
    """The rank to fit at (with a ladder: the highest); the layer may allow less. None: the kind's fullest form."""
    if job.algorithm == "full":
        return None
    convolution = any(n > 1 for n in job.shape[2:])
    if _ladder(options):
        return min(options.max_rank or MAX_RANK, *job.matrix)
    rank = largest(options, convolution=convolution)
    if options.rank is None and job.algorithm == "lora":
        rank = DEFAULT_RANK if rank is None else min(rank, DEFAULT_RANK)
    return None if rank is None else min(rank, *job.matrix)


def _recipes(job: Job, options: Options, probe: Probe) -> tuple[Recipe, ...]:
    """How a layer is fitted; nothing where it is only compared."""
    kind, rank, ladder = job.algorithm, _rank(job, options), _ladder(options)
    if kind is None:
        return ()
    if kind == "full":
        return (Recipe("full"),)
    factor = options.factor or probe.factor or DEFAULT_FACTOR
    lora = Recipe(
        "lora", rank, ladder, svd=options.svd, alpha=options.alpha, quantile=options.clamp_quantile
    )
    if kind == "auto":
        return lora, Recipe("lokr", rank, ladder=True, factor=factor), Recipe("full", ladder=True)
    if kind == "lora":
        return (lora,)
    return (Recipe("lokr", rank, ladder, factor, both=options.decompose_both),)


def _stored_bytes(job: Job, options: Options) -> int:
    """At most how many bytes this slot takes in the output."""
    size = 4 if job.dtype == "F32" else 2
    rows, columns = job.matrix
    rank = _rank(job, options)
    if job.algorithm == "lora" and rank is not None:
        return rank * (rows + columns) * size + 4
    return rows * columns * size + 4


def _step(
    job: Job, base: Checkpoint, tuned: Checkpoint, options: Options, *, streamed: bool
) -> Step[Job]:
    """`streamed`: on a CPU, where weights are subtracted as they are read."""
    rows, columns = job.matrix
    dense, rank = 4 * rows * columns, _rank(job, options) or DEFAULT_FACTOR
    # ΔW in float32; a second matrix of its size (LoKr rearranges it, full copies it, auto keeps it); the Krylov space
    copies = {"lora": 1, "auto": 4}.get(job.algorithm or "", 2)
    working = dense * copies + 4 * (rows + columns + min(rows, columns)) * 8 * rank
    sides = (base, job.base, not streamed), (tuned, job.tuned, not streamed or _ladder(options))
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


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Fit every changed slot, choose the ranks, and write the adapter; the only part that reads weights."""
    from adaptkit.files.sink import Spool

    started = time.perf_counter()
    resources = engine.Resources.choose(plan.options.device, plan.options.memory)
    looked = probe(plan.base, plan.tuned, plan.jobs, resources)
    with Spool(SPOOL, plan.output.parent) as spool:
        fitting = _Fitting(plan, looked, spool, resources)
        fitting.run(progress)
        result = _Result(plan, looked, [(job, fitting.found[id(job)]) for job in plan.jobs])
        result.choose()
        fitting.finish(result, progress)
        draft = result.report()
        size = _Writing(plan, result, spool).write(draft)
    return replace(draft, bytes=size, seconds=time.perf_counter() - started)


class _Fitting:
    """Runs the fitter over layers; their tensors go to the spool, under the number of the layer, of the form, and the role."""

    def __init__(
        self, plan: Plan, looked: Probe, spool: Spool, resources: engine.Resources
    ) -> None:
        self.plan, self.spool, self.resources = plan, spool, resources
        self.recipes = {id(job): _recipes(job, plan.options, looked) for job in plan.jobs}
        self.found: dict[int, Fitted] = {}
        self.places = {id(job): n for n, job in enumerate(plan.jobs)}
        self.steps: Sequence[Step[Job]] = plan.steps
        if not resources.on_cpu:  # which gets both weights whole
            self.steps = [
                _step(job, plan.base, plan.tuned, plan.options, streamed=False) for job in plan.jobs
            ]

    def run(self, progress: Progress | None) -> None:
        total = len(self.steps)
        told = None if progress is None else lambda done: progress(done, total)
        self._run(self.steps, self.recipes, self._keep, told)

    def finish(self, result: _Result, progress: Progress | None) -> None:
        """Now that the ranks are known: the tensors that were left for later, and both factors of a LoKr fitted together."""
        recipes = {
            id(job): again
            for job, pick in result.picked()
            if pick and (again := self._again(job, pick))
        }
        steps = [step for step in self.steps if id(step.payload) in recipes]
        total = len(steps)
        if steps:
            told = None if progress is None else lambda done: progress(done, total)
            self._run(steps, recipes, lambda job, fitted: self._complete(result, job, fitted), told)

    def _again(self, job: Job, pick: Pick) -> tuple[Recipe, ...]:
        """How a layer is fitted once more."""
        if pick.form.later:
            return (Recipe("full"),)
        first = next(
            (recipe for recipe in self.recipes[id(job)] if recipe.kind == "lokr" and recipe.ladder),
            None,
        )
        if first is None or pick.form.kind != "lokr":
            return ()
        return (replace(first, rank=pick.rank if pick.form.ladder else None, ladder=False),)

    def _run(self, steps: Sequence[Step[Job]], recipes: Any, store: Any, report: Any) -> None:
        pair = self.plan.base, self.plan.tuned
        fitter = Fitter(pair, recipes, self.plan.output, on_cpu=self.resources.on_cpu)
        work = engine.Work(
            fitter.load,
            fitter.fit,
            store,
            lambda found: sum(form.nbytes for form in found.forms),
            announce=fitter.announce if fitter.on_cpu else None,
        )
        engine.run(steps, work, self.resources, report)

    def _keep(self, job: Job, fitted: Fitted) -> None:
        for number, form in enumerate(fitted.forms):
            self._spool(job, number, form)
        self.found[id(job)] = fitted

    def _complete(self, result: _Result, job: Job, fitted: Fitted) -> None:
        found, pick, (form,) = self.found[id(job)], result.picks[id(job)], fitted.forms
        assert pick is not None
        found.lora = fitted.lora
        if pick.form.later:
            self._spool(
                job, next(n for n, other in enumerate(found.forms) if other is pick.form), form
            )
        elif form.shapes == pick.form.at(pick.rank) and form.error(0) < pick.error:
            found.forms.append(form)
            self._spool(job, len(found.forms) - 1, form)
            result.picks[id(job)] = Pick(form, 0)

    def _spool(self, job: Job, number: int, form: Form) -> None:
        for role, tensor in form.tensors.items():
            self.spool.append(f"{self.places[id(job)]}/{number}/{role}", tensor)
        form.tensors = {}


@dataclass
class _Result:
    """What was found of every layer, and what of it is stored."""

    plan: Plan
    probe: Probe
    measured: list[tuple[Job, Fitted]]
    picks: dict[int, Pick | None] = field(default_factory=dict)
    gap: float | None = None
    all_signal: bool = False
    noise: tuple[int, int] | None = (
        None  # of ladders: how many of the ranks lie within the noise, and of how many
    )

    @property
    def fitted(self) -> list[tuple[Job, Fitted]]:
        """The layers that differ and may be stored."""
        return [(job, found) for job, found in self.measured if found.forms]

    @property
    def norm(self) -> float:
        """‖Δ‖² over the model's own layers."""
        return sum(found.norm for job, found in self.measured if job.counted)

    def picked(self) -> list[tuple[Job, Pick | None]]:
        """The layers that may be stored, with what is."""
        return [(job, self.picks[id(job)]) for job, _ in self.fitted]

    def choose(self) -> None:
        """Pick a form and a rank for every layer."""
        changed = [(job, found) for job, found in self.measured if found.norm > 0]
        if not self.fitted:
            raise NothingToDo(
                _nothing(changed),
                hint="are these the two files you meant?",
                file=self.plan.tuned.source.path,
            )
        options, rule = self.plan.options, self.plan.policy
        free = [(job, found) for job, found in self.fitted if job.algorithm != "full"]
        self.picks = {id(job): Pick(found.forms[0], 0) for job, found in self.fitted}
        if not _ladder(options) or rule is None or not free:
            return
        layers = [self._layer(job, found) for job, found in free]
        mine = {id(job) for job, _ in free}
        others = [
            (self.picks.get(id(job)), found)
            for job, found in self.measured
            if job.counted and id(job) not in mine
        ]
        rest = sum(found.norm if pick is None else pick.error for pick, found in others)
        measure = self._measure([job for job, _ in free])
        try:
            if options.algo == "auto":
                chosen_ = choose_any(layers, rest, (options.size, options.error), measure)
            else:
                chosen_ = choose(layers, rest, rule, measure)
        except NotRepresentable as error:
            raise error.at(file=self.plan.tuned.source.path) from None
        self.gap, self.all_signal = chosen_.gap, chosen_.all_signal
        self.picks |= {id(job): pick for (job, _), pick in zip(free, chosen_.picks, strict=True)}
        self.noise = _noise_ranks(pick for pick in chosen_.picks if pick is not None)

    def _layer(self, job: Job, found: Fitted) -> Layer:
        assert job.slot is not None
        name = len(self.plan.keys.stem(job.slot)) + HEADER
        alpha = 4 + name if self.plan.keys.format.alpha is Alpha.TENSOR else 0
        return Layer(found, name, alpha, any(n > 1 for n in job.shape[2:]))

    def _measure(self, jobs: Sequence[Job]) -> Callable[[Sequence[Pick | None]], int]:
        """The exact size of the file for any choice: its header is built, nothing is computed."""
        from adaptkit.files.header import build_header, nbytes

        def size(picks: Sequence[Pick | None]) -> int:
            trial = _Result(
                self.plan,
                self.probe,
                self.measured,
                self.picks | dict(zip(map(id, jobs), picks, strict=True)),
            )
            writing = _Writing(self.plan, trial, None)
            specs = writing.specs()
            header, _ = build_header(specs, _metadata(self.plan, trial.report()))
            return len(header) + sum(nbytes(spec.dtype, spec.shape) for spec in specs)

        return size

    def report(self) -> Report:
        """Everything but the size of the file and the time."""
        plan = self.plan
        changed = [(job, found) for job, found in self.measured if found.norm > 0]
        left = [
            Unused(job.label, f"differs, but {job.why}")
            for job, _ in changed
            if job.algorithm is None
        ]
        stored = [
            (job, found, pick)
            for job, found in self.fitted
            if (pick := self.picks[id(job)]) is not None
        ]
        dropped = len(self.fitted) - len(stored)
        norm = self.norm
        residual = norm - sum(found.norm - pick.error for job, found, pick in stored if job.counted)
        if (
            all(job.algorithm for job, _ in changed if job.counted) and not dropped
        ):  # nothing to cancel
            residual = sum(pick.error for job, _, pick in stored if job.counted)
        residual = max(0.0, residual)
        same_size = _same_size(stored)
        return Report(
            output=plan.output,
            bytes=0,
            modules=len(stored),
            parameters=sum(pick.form.numbers(pick.rank) for _, _, pick in stored),
            relative_error=(residual / norm) ** 0.5,
            unused=(*plan.unused, *left),
            details=tuple(_detail(job, found, pick) for job, found, pick in stored),
            family=plan.base.family.name,
            format=plan.keys.format.name,
            algorithm=plan.options.algo,
            captured=max(0.0, 1.0 - residual / norm),
            unchanged=sum(1 for job, found in self.measured if found.norm == 0 and job.algorithm),
            lora_same_size=same_size and same_size[1],
            left_out=dropped,
            noise_floor=self.probe.floor,
            made_by=self.probe.made,
            gap=self.gap,
            noise_ranks=self.noise and self.noise[0],
            notes=(*plan.notes, *_notes(plan.options, same_size, left, self)),
        )


def _nothing(changed: Sequence[tuple[Job, Fitted]]) -> str:
    if not changed:
        return "nothing differs between the base and the tuned checkpoint"
    return f"no layer that an adapter can hold differs; {len(changed)} other tensors do, first {changed[0][0].label}"


def _same_size(stored: Sequence[tuple[Job, Fitted, Pick]]) -> tuple[float, float] | None:
    """Shares of ‖ΔW‖² that LoKr, and LoRA with as many parameters, keep of the layers that were fitted by LoKr."""
    fitted = [(found, pick) for _, found, pick in stored if found.lora is not None]
    norm = sum(found.norm for found, _ in fitted)
    if not norm:
        return None
    kept = 1.0 - sum(pick.error for _, pick in fitted) / norm
    return max(0.0, kept), sum(found.lora or 0.0 for found, _ in fitted) / norm


def _detail(job: Job, found: Fitted, pick: Pick) -> dict[str, Any]:
    rank, error = _stored_rank(pick), max(0.0, pick.error)
    detail: dict[str, Any] = {
        "module": job.label,
        "algorithm": pick.form.kind,
        "rank": rank,
        "relative_error": (error / found.norm) ** 0.5,
        "captured": max(0.0, 1.0 - error / found.norm),
        "norm": found.norm**0.5,
    }
    if found.lora is not None:
        detail["captured_by_lora_of_same_size"] = min(1.0, found.lora / found.norm)
    return detail


def _noise_ranks(picks: Iterable[Pick]) -> tuple[int, int]:
    """How many of the stored ranks lie within the noise of rounding, and of how many."""
    ladders = [(pick.rank, pick.form.signal) for pick in picks if pick.form.ladder]
    return sum(max(0, rank - signal) for rank, signal in ladders), sum(rank for rank, _ in ladders)


def _stored_rank(pick: Pick) -> int | None:
    """The rank that the stored shapes tell."""
    return algorithms()[pick.form.kind].facts(pick.form.at(pick.rank)).rank


def _notes(
    options: Options, same_size: tuple[float, float] | None, left: Sequence[Unused], result: _Result
) -> Iterator[str]:
    yield from _about(options, result)
    if same_size is not None:
        kept, lora = same_size
        if kept < LITTLE and lora > kept:
            yield (
                f"This LoKr keeps only {kept:.1%} of the difference, where a LoRA of the same size would keep {lora:.1%}: "
                "a difference that no LoKr made is usually far from any LoKr. Use --algo lora here."
            )
        elif lora > kept:
            yield f"This LoKr keeps {kept:.1%} of the difference, a LoRA of the same size would keep {lora:.1%}."
    if options.algo == "lokr" and (options.factor or result.probe.factor or 0) >= GUESSED:
        yield (
            f"LyCORIS guesses the factor from the shapes and fails on some layers from {GUESSED} on; ComfyUI loads them."
        )
    if left:
        count = "1 changed tensor is" if len(left) == 1 else f"{len(left)} changed tensors are"
        yield f"{count} not in the adapter, and counted in the error; `unused` says which and why."


def _about(options: Options, result: _Result) -> Iterator[str]:
    """What made the difference, where that is not what is extracted, and what was left out."""
    made = result.probe.made
    if (
        made is not None
        and made["algorithm"] == "lora"
        and (options.algo == "lokr" or (options.rank or 0) != made["rank"])
    ):
        yield f"this difference is a rank-{made['rank']} LoRA, and rounding: --rank {made['rank']} keeps all of it."
    elif made is not None and made["algorithm"] == "lokr" and options.algo == "lora":
        yield f"this difference is a LoKr of factor {made['factor']}, and rounding: --algo lokr keeps all of it."
    if result.all_signal:
        yield "no more than this stands out of the rounding noise: the size asked for is not filled with noise."
    if result.noise and result.noise[0]:
        within, ranks = result.noise
        yield f"{within} of {ranks} ranks lie within the rounding noise of the checkpoint; --size leaves such ranks out."
    dropped = sum(1 for _, pick in result.picked() if pick is None)
    if dropped:
        verb = "is" if dropped == 1 else "are"
        yield f"{dropped} of {len(result.fitted)} changed layers {verb} left out: their share is not worth its bytes."
    ladders = [
        (pick, found) for (_, pick), (_, found) in zip(result.picked(), result.fitted, strict=True)
    ]
    bound = [
        pick
        for pick, _ in ladders
        if pick and pick.form.ladder and pick.rank == len(pick.form.errors) - 1
    ]
    if _ladder(options) and bound and options.max_rank is None and options.size is None:
        full = [pick for pick in bound if pick.rank == MAX_RANK]
        if full:
            yield f"{len(full)} layers have the highest rank looked at, {MAX_RANK}; --max-rank raises it."


class _Writing:
    """The file, or PEFT's folder, of all that was picked."""

    def __init__(self, plan: Plan, result: _Result, spool: Spool | None) -> None:
        self.plan, self.spool = plan, spool
        self.stored = [
            (n, job, pick, number)
            for n, (job, found) in enumerate(result.measured)
            if found.forms and (pick := result.picks[id(job)]) is not None
            for number in [next(i for i, form in enumerate(found.forms) if form is pick.form)]
        ]

    def _named(self) -> Iterator[tuple[str, str, tuple[int, ...], Pick, str]]:
        """(name, dtype, shape, pick, key in the spool) of every tensor; alpha has no such key."""
        for n, job, pick, number in self.stored:
            assert job.slot is not None
            spell, kind = self.plan.keys.spell, pick.form.kind
            for role, shape in pick.form.at(pick.rank).items():
                yield spell(job.slot, kind, role), job.dtype, shape, pick, f"{n}/{number}/{role}"
            if pick.form.alpha is not None and self.plan.keys.format.alpha is Alpha.TENSOR:
                yield spell(job.slot, kind, ALPHA), "F32", (), pick, ""

    def specs(self) -> list[TensorSpec]:
        """In the order in which layers stand in the checkpoint."""
        return [TensorSpec(name, dtype, shape) for name, dtype, shape, _, _ in self._named()]

    def write(self, draft: Report) -> int:
        """Publish the output, and its size in bytes."""
        from adaptkit.files.sink import TensorSink

        plan = self.plan
        with adapter_file(plan.output, self._modules(), plan.options.overwrite) as (
            path,
            overwrite,
        ):
            with TensorSink(
                path, self.specs(), _metadata(plan, draft), overwrite=overwrite
            ) as sink:
                self._fill(sink)
                plan.close()
                sink.commit()
            return sink.size

    def _fill(self, sink: TensorSink) -> None:
        import torch

        assert self.spool is not None
        specs = {spec.name: spec for spec in self.spool.specs()}
        for name, dtype, _, pick, key in self._named():
            if not key:
                sink.put_bytes(name, memoryview(struct.pack("<f", _alpha(pick))))
                continue
            data, role = self.spool.read(key), key.rpartition("/")[2]
            if pick.form.ladder:
                whole = torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(specs[key].shape)
                sink.put(name, pick.form.cut(role, whole, pick.rank))
            else:
                sink.put_bytes(name, data)

    def _modules(self) -> list[Module] | None:
        """What a PEFT configuration has to say, where the format has one."""
        if self.plan.keys.format.alpha is not Alpha.CONFIG:
            return None
        found: list[Module] = []
        for _, job, pick, _ in self.stored:
            assert job.slot is not None
            rank, shapes = _stored_rank(pick) or 1, pick.form.at(pick.rank)
            alpha = rank if pick.form.alpha is None else _alpha(pick)
            name = self.plan.keys.module(job.slot)
            found.append(
                Module(name, pick.form.kind, rank, alpha, frozenset(shapes), factor_rows(shapes))
            )
        return found


def _alpha(pick: Pick) -> float:
    """alpha as it is stored: of a ladder the rank chosen."""
    if pick.form.ladder:
        return float(pick.rank)
    return 0.0 if pick.form.alpha is None else pick.form.alpha


def _metadata(plan: Plan, draft: Report) -> dict[str, str]:
    """What hosts show, and one record of what was done. No date: equal inputs give equal bytes."""
    from adaptkit.files.provenance import updated

    family, options = plan.base.family, plan.options
    kinds = {item["algorithm"] for item in draft.details}
    ranks = {
        item["rank"]
        for item in draft.details
        if item["algorithm"] != "full" and item["rank"] is not None
    }
    module = "networks.lora" if kinds <= {"lora"} or options.algo == "lora" else "lycoris.kohya"
    hosts = {"ss_network_module": module}
    if family.modelspec:
        hosts |= {
            "ss_base_model_version": family.base_version or family.modelspec,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{family.modelspec}/lora",
            "modelspec.title": plan.output.stem,
        }
    if ranks:
        rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
        alpha = rank if options.alpha is None else f"{options.alpha:g}"
        hosts |= {"ss_network_dim": rank, "ss_network_alpha": alpha}
    record = {
        "adaptkit": __version__,
        "command": "extract",
        "base": plan.base.source.path.name,
        "tuned": plan.tuned.source.path.name,
        "algorithm": options.algo,
        "rank": options.rank,
        "conv_rank": options.conv_rank,
        "factor": options.factor if options.algo in ("lokr", "auto") else None,
        **{
            name: getattr(options, name)
            for name in ("energy", "error", "size", "sv_ratio", "sv_fro", "sv_cumulative")
        },
        **{name: getattr(options, name) for name in ("max_rank", "alpha", "clamp_quantile")},
        "relative_error": float(f"{draft.relative_error:.6g}"),
        "modules": draft.modules,
    }
    return updated(hosts, {key: value for key, value in record.items() if value is not None})
