"""extract: the adapter that turns one checkpoint into another, as nearly as its kind and rank allow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.algorithms._weights import ALPHA, FitSpec, Stated
from adaptkit.detect import chosen, formats
from adaptkit.engine import Step, check_memory, peak_memory
from adaptkit.errors import NonFinite, NoSuchName, NothingToDo
from adaptkit.formats._format import Alpha
from adaptkit.keymap import KeyMap, algorithms, compile_keys
from adaptkit.ops._common import (
    Progress,
    Shared,
    Unused,
    WriterReport,
    default_output,
    refuse_unused,
    stored_dtype,
    torch_dtype,
)
from adaptkit.ops._pairing import Job, Pairing, Wanted, open_pair
from adaptkit.ops._peft import Module, adapter_file, check_adapter_output, factor_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms._weights import Weights
    from adaptkit.checkpoint import Checkpoint

__all__ = ["Options", "Plan", "Report", "plan", "run"]

DEFAULT_RANK = 32
SPOOL = 256_000_000  # bytes of results held in memory before they go to a temporary file
GUESSED = 32  # swept over all SD shapes with lycoris-lora 4.1.3: every factor below is guessed right
LITTLE = 0.5  # a LoKr that keeps less of ‖ΔW‖² than this is worth a word


@dataclass(frozen=True)
class Options(Shared):
    """What to fit. `rank` None: 32 for LoRA, a full w2 for LoKr. `vectors`: carry changed
    biases and norms exactly (None: with `full` only; several hosts refuse such keys beside a LoRA or LoKr)."""

    algo: str = "lora"
    rank: int | None = None
    conv_rank: int | None = None
    factor: int = 8
    to: str = "kohya"
    svd: str = "auto"
    vectors: bool | None = None


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

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints; sizes are upper bounds, since unchanged layers are left out."""
        fitted = [job for job in self.jobs if job.algorithm]
        return {
            "output": str(self.output),
            "family": self.base.family.name,
            "format": self.keys.format.name,
            "algorithm": self.options.algo,
            "modules": len(fitted),
            "bytes_in": sum(self.base.nbytes(j.base) + self.tuned.nbytes(j.tuned) for j in self.jobs),
            "bytes_out_at_most": sum(_stored_bytes(job, self.options) for job in fitted),
            "peak_memory": peak_memory(self.steps, self.options.memory),
            "device": self.options.device,
            "unused": [item.to_dict() for item in self.unused],
            "details": [
                {"module": j.label, "algorithm": j.algorithm, "rank": _rank(j, self.options), "shape": list(j.shape)}
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "format": self.format,
            "algorithm": self.algorithm,
            "captured": self.captured,
            "unchanged": self.unchanged,
            "notes": list(self.notes),
        }
        if self.lora_same_size is not None:
            extra["captured_by_lora_of_same_size"] = self.lora_same_size
        return {**super().to_dict(), **extra}


@dataclass
class _Measured:
    """What the engine found for one job."""

    norm: float  # ‖Δ‖²
    residual: float  # ‖Δ − stored‖²
    rank: int | None = None
    parameters: int = 0
    lora: float | None = None  # energy that a LoRA with as many parameters keeps
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # of `tensors`, kept when these have gone to the spool
    roles: tuple[str, ...] = ()
    factors: tuple[int, int] | None = None  # LoKr: rows of its two factors


def plan(base: Path, tuned: Path, options: Options) -> Plan:
    """Pair the checkpoints by target and decide what is fitted; reads headers only, and fails here if anything can."""
    _check(options)
    folder = formats()[options.to].alpha is Alpha.CONFIG
    output = options.output or default_output(tuned, options.algo, folder=folder)
    check_adapter_output(output, folder=folder, overwrite=options.overwrite)
    first, second = open_pair(base, tuned, options.family)
    keys = compile_keys(first.family.name, options.to)
    vectors = options.algo == "full" if options.vectors is None else options.vectors
    pairing = Pairing(first, second, keys, Wanted(options.algo, vectors, options))
    jobs = tuple(pairing.jobs())
    if not any(job.algorithm for job in jobs):
        raise NothingToDo("no layer of these checkpoints is selected", hint="see --only and --skip")
    refuse_unused(pairing.lost, options.allow_unused, tuned)
    steps = tuple(_step(job, first, second, options) for job in jobs)
    check_memory(steps, options.memory)
    return Plan(first, second, options, output, jobs, tuple(pairing.lost + pairing.left), steps, keys)


def _check(options: Options) -> None:
    kinds = {name for name, kind in algorithms().items() if kind.extractable}
    if options.algo not in kinds:
        raise NoSuchName.among("algorithm for extraction", options.algo, kinds)
    stored_dtype(options.dtype, "F32")
    chosen("format", formats(), options.to)


def _rank(job: Job, options: Options) -> int | None:
    """The rank asked for; the layer may allow less."""
    if job.algorithm == "full":
        return None
    convolution = any(n > 1 for n in job.shape[2:])
    chosen = options.conv_rank if convolution and options.conv_rank is not None else options.rank
    if chosen is None:
        return DEFAULT_RANK if job.algorithm == "lora" else None
    return min(chosen, *job.matrix)


def _stored_bytes(job: Job, options: Options) -> int:
    """At most how many bytes this slot takes in the output."""
    size = 4 if job.dtype == "F32" else 2
    rows, columns = job.matrix
    rank = _rank(job, options)
    if job.algorithm == "lora" and rank is not None:
        return rank * (rows + columns) * size + 4
    return rows * columns * size + 4


def _step(job: Job, base: Checkpoint, tuned: Checkpoint, options: Options) -> Step[Job]:
    rows, columns = job.matrix
    dense = 4 * rows * columns
    # ΔW in float32, a second matrix of its size (LoKr rearranges it, full copies it), and the factors
    working = dense * (1 if job.algorithm == "lora" else 2) + 4 * (rows + columns) * 8 * (_rank(job, options) or 8)
    stored = base.nbytes(job.base) + tuned.nbytes(job.tuned)
    shape = (job.shape, job.dtype, job.algorithm, job.role, base.source.infos[job.base[0].name].dtype)
    return Step(job, shape, stored + working, tuned.source.order(job.tuned[0].name))


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Fit every changed slot and write the adapter; the only part that reads weights."""
    from adaptkit.files.sink import Spool

    started = time.perf_counter()
    found: dict[int, _Measured] = {}
    fitter = _Fitter(plan)
    with Spool(SPOOL, plan.output.parent) as spool:

        def store(job: Job, result: _Measured) -> None:
            for key, tensor in result.tensors.items():
                spool.append(key, tensor)
            result.keys, result.tensors = tuple(result.tensors), {}
            found[id(job)] = result

        total = len(plan.steps)
        engine.run(
            plan.steps,
            engine.Work(fitter.load, fitter.fit, store),
            engine.Resources.choose(plan.options.device, plan.options.memory),
            None if progress is None else lambda done: progress(done, total),
        )
        measured = [(job, found[id(job)]) for job in plan.jobs]
        draft = _report(plan, measured)
        keys = [key for _, result in measured for key in result.keys]
        size = _write(plan, spool, keys, draft, _peft_modules(plan, measured))
    return replace(draft, bytes=size, seconds=time.perf_counter() - started)


class _Fitter:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.options = plan.options

    def load(self, job: Job) -> dict[str, Tensor]:
        return {"base": self.plan.base.read(job.base), "tuned": self.plan.tuned.read(job.tuned)}

    def fit(self, jobs: Sequence[Job], tensors: dict[str, Tensor]) -> list[_Measured]:
        """ΔW of a stack of equal layers, its fit as it will be stored, and what that leaves of it.

        Subtracted in float32: in bf16 one entry in nine would change.
        """
        from adaptkit.linalg.precision import difference, norm_squared

        tuned, base = tensors.pop("tuned"), tensors.pop("base")
        delta = difference(tuned, base)
        norms = norm_squared(delta).tolist()
        for job, norm, ours, theirs in zip(jobs, norms, base, tuned, strict=True):
            if not math.isfinite(norm):
                raise self._non_finite(job, ours, theirs)
        del tuned, base
        changed = [n for n, norm in enumerate(norms) if norm > 0 and jobs[0].algorithm is not None]
        results = [_Measured(norm, norm) for norm in norms]
        if changed:
            # a copy is made only of a stack in which some layers did not change
            self._fit_changed(delta if len(changed) == len(jobs) else delta[changed], jobs, changed, results)
        return results

    def _fit_changed(
        self, delta: Tensor, jobs: Sequence[Job], changed: Sequence[int], results: Sequence[_Measured]
    ) -> None:
        first = jobs[0]
        kind = algorithms()[first.algorithm or ""]
        spec = FitSpec(_rank(first, self.options), first.shape[2:], self.options.factor, self.options.svd)
        weights = kind.fit(delta, spec)
        lora = self._lora_of_size(first, delta, weights.member(0)) if first.algorithm == "lokr" else None
        for place, n in enumerate(changed):
            if lora is not None:
                results[n].lora = float(lora[place])
            self._store(jobs[n], weights.member(place), delta[place], results[n])

    def _non_finite(self, job: Job, base: Tensor, tuned: Tensor) -> NonFinite:
        import torch

        for checkpoint, tensor, pieces in ((self.plan.base, base, job.base), (self.plan.tuned, tuned, job.tuned)):
            if not bool(torch.isfinite(tensor).all()):
                return NonFinite("holds NaN or infinity", file=checkpoint.source.path, tensor=pieces[0].name)
        return NonFinite(
            "the difference of the two checkpoints overflows", file=self.plan.tuned.source.path, tensor=job.label
        )

    def _lora_of_size(self, job: Job, delta: Tensor, weights: Weights) -> Tensor:
        """The energies (B,) that the best LoRA with as many parameters as this LoKr keeps of each delta (B, m, n)."""
        from adaptkit.linalg.lowrank import SvdSpec, energies

        parameters = sum(t.numel() for role, t in weights.encode().items() if role != ALPHA)
        rank = min(parameters // sum(job.matrix), *job.matrix)
        return delta.new_zeros(len(delta)) if rank == 0 else energies(delta, rank, SvdSpec(rank)).sum(-1)

    def _store(self, job: Job, weights: Weights, delta: Tensor, result: _Measured) -> None:
        """Round to what is written, and measure what that leaves of `delta` (which it overwrites)."""
        from adaptkit.linalg.precision import cast, norm_squared

        assert job.slot is not None
        dtype = torch_dtype(job.dtype)
        if job.algorithm == "full":
            weights = replace(weights, role=job.role, vector=len(job.shape) == 1)  # type: ignore[type-var]
        try:
            encoded = {role: t if role == ALPHA else cast(t, dtype) for role, t in weights.encode().items()}
        except NonFinite as error:
            error.hint = "write with --dtype bf16 or fp32"
            raise error.at(file=self.plan.output, tensor=job.label) from None
        shapes = {role: tuple(t.shape) for role, t in encoded.items() if role != ALPHA}
        alpha = Stated(float(encoded[ALPHA])) if ALPHA in encoded else None
        facts = type(weights).facts(shapes, alpha)
        rounded = type(weights).decode({role: encoded[role] for role in shapes}, facts)
        result.residual = float(norm_squared(rounded.apply(delta, -1.0)))
        result.rank = facts.rank
        result.roles, result.factors = tuple(shapes), factor_rows(shapes)
        result.parameters = sum(encoded[role].numel() for role in shapes)
        spell = self.plan.keys.spell
        if self.plan.keys.format.alpha is not Alpha.TENSOR:
            encoded.pop(ALPHA, None)  # alpha = rank, which such formats say by leaving it out
        result.tensors = {spell(job.slot, weights.name, role): t.cpu().contiguous() for role, t in encoded.items()}


def _report(plan: Plan, measured: Sequence[tuple[Job, _Measured]]) -> Report:
    written = [(job, result) for job, result in measured if result.keys]
    changed = [(job, result) for job, result in measured if result.norm > 0]
    if not written:
        raise NothingToDo(_nothing(changed), hint="are these the two files you meant?", file=plan.tuned.source.path)
    norm = sum(result.norm for job, result in changed if job.counted)
    residual = sum(result.residual for job, result in changed if job.counted)
    left = [Unused(job.label, f"differs, but {job.why}") for job, _ in changed if job.algorithm is None]
    captured = max(0.0, 1.0 - residual / norm)
    same_size = _same_size(written)
    return Report(
        output=plan.output,
        bytes=0,
        modules=len(written),
        parameters=sum(result.parameters for _, result in written),
        relative_error=(residual / norm) ** 0.5,
        unused=(*plan.unused, *left),
        details=tuple(_detail(job, result) for job, result in written),
        family=plan.base.family.name,
        format=plan.keys.format.name,
        algorithm=plan.options.algo,
        captured=captured,
        unchanged=sum(1 for job, result in measured if result.norm == 0 and job.algorithm),
        lora_same_size=same_size and same_size[1],
        notes=tuple(_notes(plan.options, same_size, left)),
    )


def _nothing(changed: Sequence[tuple[Job, _Measured]]) -> str:
    if not changed:
        return "nothing differs between the base and the tuned checkpoint"
    return f"no layer that an adapter can hold differs; {len(changed)} other tensors do, first {changed[0][0].label}"


def _same_size(written: Sequence[tuple[Job, _Measured]]) -> tuple[float, float] | None:
    """Shares of ‖ΔW‖² that LoKr, and LoRA with as many parameters, keep of the layers that were fitted by LoKr."""
    fitted = [result for _, result in written if result.lora is not None]
    norm = sum(result.norm for result in fitted)
    if not norm:
        return None
    kept = 1.0 - sum(result.residual for result in fitted) / norm
    return max(0.0, kept), sum(result.lora or 0.0 for result in fitted) / norm


def _detail(job: Job, result: _Measured) -> dict[str, Any]:
    detail: dict[str, Any] = {
        "module": job.label,
        "algorithm": job.algorithm,
        "rank": result.rank,
        "relative_error": (result.residual / result.norm) ** 0.5,
        "captured": max(0.0, 1.0 - result.residual / result.norm),
        "norm": result.norm**0.5,
    }
    if result.lora is not None:
        detail["captured_by_lora_of_same_size"] = min(1.0, result.lora / result.norm)
    return detail


def _notes(options: Options, same_size: tuple[float, float] | None, left: Sequence[Unused]) -> Iterator[str]:
    if same_size is not None:
        kept, lora = same_size
        if kept < LITTLE and lora > kept:
            yield (
                f"This LoKr keeps only {kept:.1%} of the difference, where a LoRA of the same size would keep {lora:.1%}: "
                "a difference that no LoKr made is usually far from any LoKr. Use --algo lora here."
            )
        elif lora > kept:
            yield f"This LoKr keeps {kept:.1%} of the difference, a LoRA of the same size would keep {lora:.1%}."
    if options.algo == "lokr" and options.factor >= GUESSED:
        yield (
            f"LyCORIS guesses the factor from the shapes and fails on some layers from {GUESSED} on; ComfyUI loads them."
        )
    if left:
        count = "1 changed tensor is" if len(left) == 1 else f"{len(left)} changed tensors are"
        yield f"{count} not in the adapter, and counted in the error; `unused` says which and why."


def _peft_modules(plan: Plan, measured: Sequence[tuple[Job, _Measured]]) -> list[Module] | None:
    """What a PEFT configuration has to say, where the format has one: alpha = rank everywhere."""
    if plan.keys.format.alpha is not Alpha.CONFIG:
        return None
    found: list[Module] = []
    for job, result in measured:
        if result.keys and job.slot is not None and job.algorithm is not None:
            name = plan.keys.module(job.slot)
            rank = result.rank or 1
            found.append(Module(name, job.algorithm, rank, rank, frozenset(result.roles), result.factors))
    return found


def _write(plan: Plan, spool: Any, keys: Sequence[str], draft: Report, modules: list[Module] | None) -> int:
    from adaptkit.files.sink import TensorSink

    specs = {spec.name: spec for spec in spool.specs()}
    chosen_specs, metadata = [specs[key] for key in keys], _metadata(plan, draft)
    with adapter_file(plan.output, modules, plan.options.overwrite) as (path, overwrite):
        with TensorSink(path, chosen_specs, metadata, overwrite=overwrite) as sink:
            spool.write_to(sink)
            plan.close()
            sink.commit()
        return sink.size


def _metadata(plan: Plan, draft: Report) -> dict[str, str]:
    """What hosts show, and one record of what was done. No date: equal inputs give equal bytes."""
    from adaptkit.files.provenance import updated

    family, options = plan.base.family, plan.options
    ranks = {item["rank"] for item in draft.details if item["algorithm"] == options.algo and item["rank"] is not None}
    module = {"lora": "networks.lora"}.get(options.algo, "lycoris.kohya")
    hosts = {
        "ss_base_model_version": family.base_version or family.modelspec,
        "ss_network_module": module,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec}/lora",
        "modelspec.title": plan.output.stem,
    }
    if ranks:
        rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
        hosts |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    record = {
        "adaptkit": __version__,
        "command": "extract",
        "base": plan.base.source.path.name,
        "tuned": plan.tuned.source.path.name,
        "algorithm": options.algo,
        "rank": options.rank,
        "conv_rank": options.conv_rank,
        "factor": options.factor if options.algo == "lokr" else None,
        "relative_error": float(f"{draft.relative_error:.6g}"),
        "modules": draft.modules,
    }
    return updated(hosts, {key: value for key, value in record.items() if value is not None})
