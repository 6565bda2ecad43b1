"""merge: bake adapters into a checkpoint, streaming; what no adapter touches is copied as bytes."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import __version__, engine
from adaptkit.adapter import Adapter, Entry
from adaptkit.checkpoint import Checkpoint, Piece, exchanged
from adaptkit.engine import Step, check_memory
from adaptkit.errors import NonFinite, NothingToDo, NotRepresentable, ShapeMismatch
from adaptkit.files.header import TensorSpec, nbytes
from adaptkit.ops._blocks import Blocks
from adaptkit.ops._common import (
    Progress,
    Unused,
    WriterReport,
    check_output,
    default_output,
    refuse_unused,
    selected,
    stored_dtype,
    torch_dtype,
)
from adaptkit.ops._layout import as_single, opened, plan_layout
from adaptkit.ops._merging import Contribution, Job, Options, Plan
from adaptkit.ops._requantise import quantised, widened
from adaptkit.ops._stats import block_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.names import Slot
    from adaptkit.ops._layout import Layout, Output, Volume
    from adaptkit.ops._verify import Verified

__all__ = ["Options", "Plan", "Report", "plan", "run"]

ROW_CHUNK = 1 << 20  # elements compared at a time when measuring what a merge changed


@dataclass(frozen=True, kw_only=True)
class Report(WriterReport):
    """What was merged: `changed` tensors that differ from the base, and ‖ΔW‖/‖W‖ over the touched ones.

    `blocks`: the same for each block; `block_weights`: what each rule of `--blocks` got; `left_out`: files of the base's
    folder that are not in the output, because they hold the weights that were merged into once more.
    """

    family: str
    adapters: tuple[Mapping[str, Any], ...]
    tensors: int
    changed: int
    relative_change: float
    blocks: tuple[Mapping[str, Any], ...] = ()
    block_weights: tuple[Mapping[str, Any], ...] = ()
    verified: Verified | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    quantised: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "adapters": [dict(item) for item in self.adapters],
            "tensors": self.tensors,
            "tensors_changed": self.changed,
            "relative_change": self.relative_change,
            "blocks": [dict(item) for item in self.blocks],
            "block_weights": [dict(item) for item in self.block_weights],
            "verified": None if self.verified is None else self.verified.to_dict(),
            "files": list(self.files),
            "left_out": list(self.left_out),
            "quantised": self.quantised,
        }
        return {**super().to_dict(), **extra}


@dataclass(frozen=True)
class _Merged:
    """A merged tensor as stored (with its scale), ‖W‖², ‖ΔW‖² and the ‖·‖² lost to its rounding."""

    tensor: Tensor
    scale: Tensor | None
    weight: float
    delta: float
    rounding: float


UNCHANGED = _Merged(None, None, 0.0, 0.0, 0.0)  # type: ignore[arg-type]


def plan(base: Path, adapters: Sequence[tuple[Path, float]], options: Options) -> Plan:
    """Find the place of every adapter module in the base; reads headers only, and fails here if anything can."""
    with ExitStack() as failing:
        checkpoint = failing.enter_context(Checkpoint.open(base, family=options.family))
        opened = []
        for path, _ in adapters:
            opened.append(_open_adapter(checkpoint, path, options))
            failing.callback(opened[-1].close)
        made = _planned(base, checkpoint, tuple(opened), tuple(strength for _, strength in adapters), options)
        failing.pop_all()
        return made


def _planned(
    path: Path, base: Checkpoint, adapters: tuple[Adapter, ...], strengths: tuple[float, ...], options: Options
) -> Plan:
    single = as_single(base.source, options.output, options.shard_size)
    output = options.output or default_output(path, "merged", folder=not single)
    if single:
        check_output(output, options.overwrite)
    places = _Places(base, adapters, strengths, options)
    jobs = places.jobs()
    for adapter, lost in zip(adapters, places.unused, strict=True):
        refuse_unused(lost, options.allow_unused, adapter.source.path)
    if not jobs:
        raise NothingToDo(
            "no module of these adapters applies to this checkpoint", hint="see --only and --skip", file=path
        )
    places.blocks.check()
    working = _working(base, jobs, options)
    specs = tuple(_specs(base, {job.name: job for job in working}, options))
    layout = plan_layout(
        base.source, specs, {name for job in working for name in job.writes()}, single, options.shard_size
    )
    if layout.folder:
        _check_folder(output, layout, options)
    steps = tuple(_step(job, base, adapters) for job in working)
    check_memory(steps, options.memory)
    unused = tuple(item for items in places.unused for item in items)
    rules = tuple(places.blocks.records())
    return Plan(base, adapters, strengths, options, output, jobs, specs, unused, steps, layout, rules)


def _check_folder(output: Path, layout: Layout, options: Options) -> None:
    from adaptkit.files.sink import check_folder

    check_folder(output, layout.top, options.overwrite)


def _working(base: Checkpoint, jobs: Sequence[Job], options: Options) -> tuple[Job, ...]:
    """The jobs that make another tensor than the base has, in its order: those of other tensors only change the dtype."""
    placed = {job.name: job for job in jobs}
    if options.dtype != "keep" and base.quantization.refused:
        name, scheme = next(iter(base.quantization.refused.items()))
        raise NotRepresentable(
            f"stored as {scheme}, which cannot be converted",
            hint="leave --dtype away",
            file=base.source.path,
            tensor=name,
        )
    found = []
    for info in base.source.infos.values():
        job = placed.get(info.name)
        if job is not None and job.changes:
            found.append(job)
        elif options.dtype != "keep" and info.name not in base.quantization.extras:
            dtype = _new_dtype(base, info.name, options)
            if dtype != info.dtype or info.name in base.quantization.scales:
                found.append(Job(info.name, dtype, ()))
    return tuple(found)


def _new_dtype(base: Checkpoint, name: str, options: Options) -> str:
    """The dtype a tensor gets: numbers are converted when asked for, indices and what cannot be read stay."""
    info = base.source.infos[name]
    return info.dtype if base.quantization.refusal(info) else stored_dtype(options.dtype, info.dtype)


def _specs(base: Checkpoint, working: Mapping[str, Job], options: Options) -> Iterator[TensorSpec]:
    """All tensors of the output in the base's order; those that describe scaled weights go when nothing is scaled any more."""
    stored = base.quantization
    dropped = stored.extras if options.dtype != "keep" else frozenset[str]()
    for info in base.source.infos.values():
        if info.name not in dropped:
            yield TensorSpec(info.name, working[info.name].dtype if info.name in working else info.dtype, info.shape)


def _open_adapter(base: Checkpoint, path: Path, options: Options) -> Adapter:
    adapter = Adapter.open(path, format=options.format)
    family = base.family.name
    if adapter.family.name != family and family in adapter.detection.alternatives:
        adapter.close()
        adapter = Adapter.open(path, family=family, format=options.format)
    if adapter.family.name != family:
        adapter.close()
        raise ShapeMismatch(
            f"this adapter is for {adapter.family.title}, the checkpoint is {base.family.title}",
            hint="see `adaptkit inspect` on both",
            file=path,
        )
    return adapter


class _Places:
    """Finds where each entry applies; what finds no place goes to `unused`, per adapter."""

    def __init__(
        self, base: Checkpoint, adapters: Sequence[Adapter], strengths: Sequence[float], options: Options
    ) -> None:
        self.base, self.adapters, self.strengths, self.options = base, adapters, strengths, options
        self.blocks = Blocks(options.blocks, base.family)
        self.held = base.targets()
        self.unused: list[list[Unused]] = [
            [Unused(key, reason) for key, reason in adapter.unclaimed.items()] for adapter in adapters
        ]
        self.found: dict[str, list[Contribution]] = {}

    def jobs(self) -> tuple[Job, ...]:
        for number, adapter in enumerate(self.adapters):
            for slot, entry in adapter.entries.items():
                if selected(adapter.label(slot), slot.component, self.options):
                    self._entry(number, adapter, slot, entry)
        order = self.base.source.infos
        return tuple(self._job(name, self.found[name]) for name in order if name in self.found)

    def _job(self, name: str, contributions: Sequence[Contribution]) -> Job:
        info, stored = self.base.source.infos[name], self.base.quantization
        if (reason := stored.refusal(info)) is not None:
            raise NotRepresentable(
                f"stored as {reason}: an adapter cannot be added to that",
                hint="use an fp32, fp16, bf16 or fp8 (e4m3, e5m2) checkpoint of this model",
                file=self.base.source.path,
                tensor=name,
            )
        dtype = stored_dtype(self.options.dtype, info.dtype)
        scale = stored.scales.get(name) if self.options.dtype == "keep" else None
        return Job(name, dtype, tuple(contributions), scale)

    def _entry(self, number: int, adapter: Adapter, slot: Slot, entry: Entry) -> None:
        label = adapter.label(slot)
        pieces = self.base.locate(slot, self.held.get(slot.target, {}))
        if pieces is None:
            reason = f"the checkpoint has no {label}"
            self.unused[number].extend(Unused(key, reason) for key in entry.keys.values())
            return
        self._check_shape(adapter, label, entry, pieces)
        strength = self.strengths[number] * self.blocks.weight(slot)
        for piece, cut in _cuts(self.base, pieces):
            self.found.setdefault(piece.name, []).append(Contribution(number, entry, piece.rows, cut, label, strength))

    def _check_shape(self, adapter: Adapter, label: str, entry: Entry, pieces: tuple[Piece, ...]) -> None:
        shape = self.base.slot_shape(pieces)
        rows, columns = shape[0] if shape else 1, 1
        for n in shape[1:]:
            columns *= n
        known = entry.facts.rows or rows, entry.facts.columns or columns  # some kinds do not tell both
        if known != (rows, columns):
            raise ShapeMismatch(
                f"{label} is {rows} × {columns} in the checkpoint, {known[0]} × {known[1]} in the adapter",
                hint="the adapter was made for another model of this family, or another family",
                file=adapter.source.path,
            )


def _cuts(base: Checkpoint, pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Each piece with the rows of the entry that fall on it (None: all of them)."""
    if len(pieces) == 1:
        yield pieces[0], None
        return
    start = 0
    for piece in pieces:
        rows = base.shape(piece.name)[0]
        yield piece, (start, start + rows)
        start += rows


def _step(job: Job, base: Checkpoint, adapters: Sequence[Adapter]) -> Step[Job]:
    info = base.source.infos[job.name]
    infos = [
        (c.adapter, role, adapters[c.adapter].source.infos[key])
        for c in job.contributions
        if c.strength
        for role, key in c.entry.tensors()
    ]
    # W stored, W in float32, the merged tensor; a kind without factors needs its dense ΔW beside them; scaled weights
    # are kept as they were read, and widened once more to see what rounding did
    kinds = ((c.entry.facts.rank, c.entry.kind.name) for c in job.contributions if c.strength)
    dense = max((0 if rank and kind == "lora" else 4 * info.numel for rank, kind in kinds), default=0)
    scaled = 8 * info.numel if base.quantization.widens(info) else 0
    merged = nbytes(job.dtype, info.shape)
    size = info.nbytes + 4 * info.numel + merged + dense + scaled + 3 * sum(i.nbytes for _, _, i in infos)
    contents = tuple(
        (c.entry.kind.name, c.rows, c.cut, c.entry.facts.scale, c.adapter, c.strength)
        for c in job.contributions
        if c.strength
    )
    place = base.places.get(job.name)
    shape = (
        info.shape,
        info.dtype,
        job.dtype,
        place is not None and (place.transposed, place.swapped),
        (key := base.quantization.scales.get(job.name)) and base.source.infos[key].shape,
        contents,
        tuple((a, role, i.shape, i.dtype) for a, role, i in infos),
    )
    return Step(job, shape, size, base.source.order(job.name))


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Merge and write; the only part that reads weights."""
    from adaptkit.ops._verify import verify

    started = time.perf_counter()
    found: dict[str, _Merged] = {}
    total = len(plan.steps)
    merger = _Merger(plan)
    records = _Provenance(plan)
    options = plan.options
    verified = None
    with opened(
        plan.layout, plan.output, records.metadata, overwrite=options.overwrite, hidden=options.verify
    ) as output:

        def store(job: Job, result: _Merged) -> None:
            output.put(job.name, result.tensor)
            if job.scale is not None and result.scale is not None:
                output.put(job.scale, result.scale)
            found[job.name] = replace(result, tensor=None, scale=None)  # type: ignore[arg-type]

        _copy_untouched(plan, output)
        engine.run(
            plan.steps,
            engine.Work(merger.load, merger.merge, store),
            engine.Resources.choose(options.device, options.memory),
            None if progress is None else lambda done: progress(done, total),
        )
        if not options.verify:
            plan.close()  # on Windows a file that is open cannot be replaced
        output.finish()
        if options.verify:
            verified = verify(plan, output.at)
            plan.close()
    return _report(plan, found, verified, time.perf_counter() - started)


def _copy_untouched(plan: Plan, output: Output) -> None:
    made = {name for job in plan.working for name in job.writes()}
    output.copy(plan.base.source, [spec.name for spec in plan.specs if spec.name not in made])


class _Merger:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def load(self, job: Job) -> dict[str, Tensor]:
        base = self.plan.base
        loaded = {"base": base.source.read(job.name)}
        if (key := base.quantization.scales.get(job.name)) is not None:
            loaded["scale"] = base.source.read(key)
        for n, c in enumerate(job.contributions):
            stored = self.plan.adapters[c.adapter].read(c.entry) if c.strength else {}
            loaded |= {f"{n}/{role}": tensor for role, tensor in stored.items()}
        return loaded

    def merge(self, jobs: Sequence[Job], tensors: dict[str, Tensor]) -> list[_Merged]:
        """All adapters of a tensor are applied in float32 (float64 for such a base), then rounded once."""
        stored, scale = tensors.pop("base"), tensors.pop("scale", None)
        wide = widened(stored, scale)
        # what ΔW is measured from: the numbers that were meant, not their codes
        before = wide.clone() if scale is not None or stored.dtype.itemsize == 1 else stored
        matrix = wide.reshape(*wide.shape[:2], -1) if wide.ndim > 1 else wide.reshape(-1, 1, 1)
        self._add(jobs[0], matrix, tensors)
        # a batch is of equal shapes and contributions; each member is finished on its own
        scales = [None] * len(jobs) if scale is None else list(scale)
        return [self._finished(job, wide[n], before[n], scales[n]) for n, job in enumerate(jobs)]

    def _add(self, job: Job, matrix: Tensor, tensors: Mapping[str, Tensor]) -> None:
        place = self.plan.base.places.get(job.name)
        if place is None:
            return
        view = matrix.transpose(-1, -2) if place.transposed else matrix
        view = exchanged(matrix, -2) if place.swapped else view
        for n, c in enumerate(job.contributions):
            if c.strength:
                self._apply(view, n, c, tensors)
        if place.swapped:
            matrix.copy_(exchanged(view, -2))

    def _apply(self, view: Tensor, n: int, c: Contribution, tensors: Mapping[str, Tensor]) -> None:
        roles = {role: tensors[f"{n}/{role}"] for role, _ in c.entry.tensors()}
        weights = c.entry.decode(roles)
        if c.cut is not None:
            weights = weights.part(*c.cut)
        rows = view if c.rows is None else view[..., slice(*c.rows), :]
        applied = weights.apply(rows, c.strength)
        if applied is not rows:
            rows.copy_(applied)

    def _finished(self, job: Job, merged: Tensor, stored: Tensor, scale: Tensor | None) -> _Merged:
        rounded, scale, back = self._rounded(job, merged, scale)
        weight, delta, rounding = 0.0, 0.0, 0.0
        for old, new, out in _chunks(stored, merged, back):
            weight += _square(old)
            delta += _square(new - old)
            rounding += _square(out.to(new.dtype) - new)
        if not math.isfinite(delta):
            raise self._non_finite(job, stored)
        if not math.isfinite(rounding):
            raise self._too_large(job, merged)
        return _Merged(rounded.cpu(), None if scale is None else scale.cpu(), weight, delta, rounding)

    def _rounded(self, job: Job, merged: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(as stored, its new scale if it has one, the numbers that these mean)."""
        from adaptkit.linalg.precision import cast

        if job.scale is not None and scale is not None:
            rounded, fresh = quantised(merged, scale, job.dtype)
            return rounded, fresh, widened(rounded.unsqueeze(0), fresh.unsqueeze(0))[0]
        target = torch_dtype(job.dtype)
        try:  # fp8 clamps where the others overflow, which shows in the sums
            rounded = cast(merged, target) if target.itemsize == 1 else merged.to(target)
        except NonFinite:
            raise self._too_large(job, merged) from None
        return rounded, None, rounded

    def _too_large(self, job: Job, merged: Tensor) -> NonFinite:
        return NonFinite(
            f"the merged weight, {float(merged.abs().max()):.4g} at most, "
            f"does not fit {str(torch_dtype(job.dtype)).removeprefix('torch.')}",
            hint="lower the strength, or write with --dtype bf16 or fp32",
            file=self.plan.output,
            tensor=job.name,
        )

    def _non_finite(self, job: Job, stored: Tensor) -> NonFinite:
        import torch

        if not bool(torch.isfinite(stored).all()):
            return NonFinite("holds NaN or infinity", file=self.plan.base.source.path, tensor=job.name)
        for c in job.contributions:
            adapter = self.plan.adapters[c.adapter]
            for _, key in c.entry.tensors():
                if not bool(torch.isfinite(adapter.source.read(key)).all()):
                    return NonFinite("holds NaN or infinity", file=adapter.source.path, tensor=key)
        return NonFinite("the merged weight overflows", file=self.plan.output, tensor=job.name)


def _square(x: Tensor) -> float:
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(x.unsqueeze(0)))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), ROW_CHUNK):
        first, *rest = (t[start : start + ROW_CHUNK] for t in flat)
        yield first.to(rest[0].dtype), *rest


def _report(plan: Plan, found: Mapping[str, _Merged], verified: Verified | None, seconds: float) -> Report:
    results = {job.name: found.get(job.name, UNCHANGED) for job in plan.jobs}
    delta = sum(result.delta for result in results.values())
    # what a change of dtype does to the layers without an adapter is no loss of theirs
    rounding = sum(result.rounding for result in results.values())
    weight = sum(result.weight for result in results.values())
    written = (plan.output / path for path in plan.layout.files()) if plan.layout.folder else [plan.output]
    return Report(
        output=plan.output,
        bytes=sum(path.stat().st_size for path in written),
        modules=sum(len(job.contributions) for job in plan.jobs),
        parameters=sum(math.prod(spec.shape) for spec in plan.specs),
        relative_error=_ratio(rounding, delta) or 0.0,
        unused=plan.unused,
        seconds=seconds,
        details=tuple(_detail(job, c, results[job.name]) for job in plan.jobs for c in job.contributions),
        family=plan.base.family.name,
        adapters=tuple(plan.described()),
        tensors=len(plan.specs),
        changed=sum(1 for result in results.values() if result.delta > 0),
        relative_change=_ratio(delta, weight) or 0.0,
        blocks=tuple(_by_block(plan, results)),
        block_weights=plan.rules,
        verified=verified,
        files=tuple(plan.layout.files()),
        left_out=plan.layout.left_out,
        quantised=sum(job.changes and job.dtype.startswith("F8") for job in plan.jobs),
    )


def _ratio(part: float, whole: float) -> float | None:
    """√(part / whole) of sums of squares; None where there is nothing to compare with."""
    return (part / whole) ** 0.5 if whole else None


def _detail(job: Job, c: Contribution, result: _Merged) -> dict[str, Any]:
    return {
        "module": c.label,
        "tensor": job.name,
        "algorithm": c.entry.kind.name,
        "rank": c.entry.facts.rank,
        "strength": c.strength,
        "relative_error": _ratio(result.rounding, result.delta) or 0.0,
        "relative_change": _ratio(result.delta, result.weight),
    }


def _by_block(plan: Plan, results: Mapping[str, _Merged]) -> Iterator[dict[str, Any]]:
    """Tensors changed and ‖ΔW‖/‖W‖ of each block, in the base's order."""
    blocks: dict[str, list[Job]] = {}
    for job in plan.jobs:
        c = job.contributions[0]
        blocks.setdefault(block_of(c.label, c.entry.slot.component), []).append(job)
    for block, jobs in blocks.items():
        found = [results[job.name] for job in jobs]
        yield {
            "block": block,
            "tensors": len(jobs),
            "tensors_changed": sum(result.delta > 0 for result in found),
            "relative_change": _ratio(sum(r.delta for r in found), sum(r.weight for r in found)),
        }


class _Provenance:
    """What the metadata says was merged: names, strengths and hashes, nothing about when or where.

    `modelspec.merged_from` is what sd-scripts writes, `sd_merge_recipe` and `sd_merge_models` what the web UI does and
    hosts of models show; `adaptkit` is our own record.
    """

    def __init__(self, plan: Plan) -> None:
        from adaptkit.files.provenance import sha256

        self.plan = plan
        self.hashes = ["+".join(map(sha256, adapter.source.files)) for adapter in plan.adapters]

    def metadata(self, volume: Volume) -> dict[str, str]:
        """The metadata of one file of the output."""
        from adaptkit.files.provenance import updated

        plan = self.plan
        base = {"name": plan.base.source.path.name, **_stated(plan.base.source.metadata)}
        merged = [
            {"name": a.source.path.name, "sha256": digest, "strength": strength}
            for a, digest, strength in zip(plan.adapters, self.hashes, plan.strengths, strict=True)
        ]
        record: dict[str, Any] = {"adaptkit": __version__, "command": "merge", "base": base, "adapters": merged}
        if plan.options.blocks:
            record["blocks"] = list(plan.options.blocks)
        for option in ("only", "skip"):
            if getattr(plan.options, option):
                record[option] = list(getattr(plan.options, option))
        found = updated(volume.metadata, record)
        return {**found, **_for_hosts(found, base, merged)} if any(job.changes for job in plan.jobs) else found


STATED = {"modelspec.hash_sha256": "modelspec.hash_sha256", "sshs_model_hash": "sshs_model_hash"}


def _stated(metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes that the base says of itself: its gigabytes are not read for one."""
    return {name: metadata[key] for key, name in STATED.items() if key in metadata}


def _for_hosts(
    metadata: Mapping[str, str], base: Mapping[str, str], merged: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    earlier = metadata.get("modelspec.merged_from")
    names = [earlier or base["name"].rpartition(".")[0] or base["name"], *(_bare(item["name"]) for item in merged)]
    recipe = {
        "type": "adaptkit",
        "base_model": dict(base),
        "loras": [dict(item) for item in merged],
        "dtype": "float32",
    }
    models = {item["sha256"]: {"name": item["name"]} for item in merged}
    return {
        "modelspec.merged_from": ", ".join(names),
        "sd_merge_recipe": _compact(recipe),
        "sd_merge_models": _compact({**_earlier_models(metadata), **models}),
    }


def _earlier_models(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("sd_merge_models", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bare(name: str) -> str:
    return name.rpartition(".")[0] or name


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
