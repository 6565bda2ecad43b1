"""advise: what each kind of adapter would lose of a difference, and the bytes it would take.

The curves are computed without fitting, from singular values and Kronecker scans. So they are of
LoRA, LoKr and full differences alone, by name: the JSON report is made of these names.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.detect import chosen, formats
from adaptkit.errors import NothingToDo, WrongUsage
from adaptkit.formats.contract import Alpha
from adaptkit.hosts import usual_format
from adaptkit.keymap.kinds import low_rank_kind
from adaptkit.ops.adapter_file.size import module_size
from adaptkit.ops.difference.advice import Advice, Point, recommend
from adaptkit.ops.difference.look import looking_bytes, reading_bytes
from adaptkit.ops.difference.measuring import Layer, Measurer
from adaptkit.ops.difference.pairing import Pairing, Wanted, open_pair
from adaptkit.ops.difference.probe import Probe, made_by
from adaptkit.ops.difference.working import energies_bytes
from adaptkit.ops.ranks.forms import EXPLAINED
from adaptkit.ops.ranks.knapsack import RankCurve, least_error
from adaptkit.ops.ranks.options import MAX_RANK
from adaptkit.ops.ranks.rules.size import Size
from adaptkit.ops.shared import Brief, Closing, Shared, Unused, refuse_unused, settle
from adaptkit.ops.stages import Progress, counting, logged
from adaptkit.steps import Step, check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.keymap import KeyMap
    from adaptkit.ops.difference.pairing import Pair

__all__ = ["Options", "Plan", "Report", "plan", "run"]

USUAL = (
    2,
    4,
    8,
    16,
    32,
)  # the factors of LoKr that are always shown


@dataclass(frozen=True)
class Options:
    """The curves to measure: ranks up to `max_rank`, in the key format `to`, as `dtype`.

    Without `to` it is the format that `extract` would write.
    """

    max_rank: int = MAX_RANK
    to: str | None = None
    family: str | None = None
    dtype: str = "keep"
    device: str = "auto"
    memory: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    allow_unused: bool = False
    ema: bool = False

    def __post_init__(self) -> None:
        settle(self)

    @property
    def shared(self) -> Shared:
        """The options that pair two checkpoints."""
        return Shared(family=self.family, dtype=self.dtype, only=self.only, skip=self.skip)


@dataclass(frozen=True, repr=False)
class Plan(Closing):
    """Everything known before a weight is read."""

    base: Checkpoint
    tuned: Checkpoint
    options: Options
    keys: KeyMap
    jobs: tuple[Pair, ...]
    steps: tuple[Step[Pair], ...]
    unused: tuple[Unused, ...]
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Close both checkpoints."""
        self.base.close()
        self.tuned.close()


@dataclass(frozen=True, repr=False, kw_only=True)
class Report(Brief):
    """The curves.

    By rank: `rank` is LoRA of one rank everywhere; at the same bytes, `size` is LoRA with each
    rank chosen, `auto` the best of everything. By factor: `lokr`, and at the same bytes `beside`,
    which is LoRA.

    `noise_floor` is the rounding of the tuned checkpoint relative to ‖ΔW‖: smaller errors mean
    nothing. `left_out` is the relative error of what no adapter of this format holds (biases,
    norms, embeddings); every curve contains it.
    """

    family: str
    format: str
    layers: int
    unchanged: int
    norm: float
    noise_floor: float
    left_out: float
    rank: Mapping[int, Point]
    size: Mapping[int, Point]
    auto: Mapping[int, Point]
    lokr: Mapping[int, Point]
    beside: Mapping[int, Point]
    made_by: Mapping[str, Any] | None = None
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def recommended(self) -> Advice | None:
        """What to extract."""
        return recommend(self.rank, self.size, self.auto, self.lokr, self.made_by)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: one record per rank, and one per factor."""
        ranks = [
            {
                "rank": k,
                "lora_rank": c.to_dict(),
                "lora_size": self.size[k].to_dict(),
                "auto": self.auto[k].to_dict(),
            }
            for k, c in self.rank.items()
        ]
        factors = [
            {"factor": f, "lokr": c.to_dict(), "lora_size": self.beside[f].to_dict()}
            for f, c in self.lokr.items()
        ]
        return {
            "family": self.family,
            "format": self.format,
            "layers": self.layers,
            "unchanged": self.unchanged,
            "norm": self.norm,
            "noise_floor": self.noise_floor,
            "left_out": self.left_out,
            "made_by": None if self.made_by is None else dict(self.made_by),
            "recommended": None if self.recommended is None else self.recommended.to_dict(),
            "lora": ranks,
            "lokr": factors,
            "unused": [item.to_dict() for item in self.unused],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


# --- planning --------------------------------------------------------------------------------


def plan(base: str | PathLike[str], tuned: str | PathLike[str], options: Options) -> Plan:
    """Pair the checkpoints. Reads headers only; anything that can fail fails here."""
    if options.max_rank < 1:
        raise WrongUsage(f"--max-rank must be at least 1, not {options.max_rank}")
    if options.to is not None:
        chosen("format", formats(), options.to)
    base, tuned = Path(base), Path(tuned)
    first, second = open_pair(base, tuned, options.family, ema=options.ema)
    keys = first.keys(formats()[options.to or usual_format(first.family.name)])
    pairing = Pairing(first, second, keys, Wanted(low_rank_kind().name, False, options.shared))
    jobs = pairing.pairs()
    pairing.selection.check("these checkpoints")
    if not any(job.algorithm for job in jobs):
        raise NothingToDo("no layer of these checkpoints is selected", hint="see --only and --skip")
    refuse_unused(pairing.lost, options.allow_unused, tuned)
    steps = tuple(_step(job, first, second, options.max_rank) for job in jobs)
    check_memory(steps, options.memory)
    return Plan(first, second, options, keys, jobs, steps, tuple(pairing.lost), pairing.notes)


def _step(job: Pair, base: Checkpoint, tuned: Checkpoint, rank: int) -> Step[Pair]:
    rows, columns = job.matrix
    kept = 4 * rows * columns + energies_bytes(rows, columns, rank)
    size = max(reading_bytes(base, tuned, job), looking_bytes(job), kept)
    return Step(job, job.number, size, tuned.source.order(job.tuned[0].name))


# --- measuring -------------------------------------------------------------------------------


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Measure every layer and draw the curves; the only part that reads weights."""
    started = time.perf_counter()
    found: dict[int, Layer] = {}
    worker = Measurer(plan.base, plan.tuned, plan.options.max_rank)

    def store(job: Pair, layer: Layer) -> None:
        found[job.number] = layer

    resources = engine.Resources.choose(plan.options.device, plan.options.memory)
    steps, work = worker.steps(plan.jobs, resources.device), worker.stack
    if steps is None:
        steps, work = plan.steps, worker.single
    try:
        with logged("advise", progress) as told:
            notes = engine.run(
                steps,
                engine.Work(worker.load, work, store, held=lambda _: 0),
                resources,
                counting(told, "measuring", len(plan.steps), "layers"),
            )
    finally:
        plan.close()
    report = _report(plan, [found[job.number] for job in plan.jobs], started)
    return replace(report, notes=(*report.notes, *notes))


# --- choosing --------------------------------------------------------------------------------


def _report(plan: Plan, layers: Sequence[Layer], started: float) -> Report:
    fitted = [layer for layer in layers if layer.energies]
    if not fitted:
        raise NothingToDo(
            "no layer that an adapter can hold differs",
            hint="are these the two files you meant?",
            file=plan.tuned.source.path,
        )
    curves = _Curves(plan, fitted, sum(layer.norm for layer in layers))
    looks = [layer.seen for layer in fitted if layer.seen]
    probe = Probe(math.sqrt(sum(one.floor for one in looks) / curves.total), made_by(looks))
    most = plan.options.max_rank
    ranks = [*(k for k in (2**n for n in range(20)) if k < most), most]
    if probe.rank is not None and probe.rank < most:
        # the rank to recommend, with what it loses
        ranks = sorted({*ranks, probe.rank})
    same = {k: curves.lora([min(k, len(layer.energies)) for layer in fitted]) for k in ranks}
    factors = sorted({*USUAL, *([probe.factor] if probe.factor else [])})
    lokr = _distinct({factor: curves.lokr(factor) for factor in factors})
    left = sum(layer.norm for layer in layers if not layer.energies)
    return Report(
        family=plan.base.family.name,
        format=plan.keys.format.name,
        layers=len(fitted),
        unchanged=sum(1 for layer in layers if layer.norm == 0.0 and layer.job.algorithm),
        norm=math.sqrt(curves.total),
        noise_floor=probe.floor,
        left_out=math.sqrt(left / curves.total),
        rank=same,
        size={k: curves.lora_within(one.bytes) for k, one in same.items()},
        auto={k: curves.auto(one.bytes) for k, one in same.items()},
        lokr=lokr,
        beside={f: curves.lora_within(one.bytes) for f, one in lokr.items()},
        made_by=probe.made,
        unused=plan.unused,
        notes=(*plan.notes, *probe.notes()),
        seconds=time.perf_counter() - started,
    )


def _signal(layer: Layer) -> int:
    """How many singular values of a layer stand out of the rounding noise."""
    from adaptkit.linalg.noise import noise_edge

    m, n = layer.job.matrix
    edge = (layer.seen.noise if layer.seen else 0.0) / (m * n) * noise_edge(m, n)
    return sum(energy > edge for energy in layer.energies)


class _Curves:
    """Bytes and errors of the ways to store the layers that differ."""

    def __init__(self, plan: Plan, layers: Sequence[Layer], total: float) -> None:
        self.plan, self.layers, self.total = plan, layers, total
        # ‖·‖² of what no adapter holds
        self.rest = max(0.0, total - sum(layer.norm for layer in layers))
        self.alpha = plan.keys.format.alpha is Alpha.TENSOR
        self.modules = [self._module(layer, layer.energies) for layer in layers]
        # as in `extract --size`, which is not filled with rounding noise
        signal = [self._module(layer, layer.energies[: _signal(layer)]) for layer in layers]
        self.signal = signal if any(module.energies for module in signal) else self.modules
        self.options = [list(self._options(n)) for n in range(len(layers))]

    def _module(self, layer: Layer, energies: Sequence[float]) -> RankCurve:
        sizes = [
            k and self._bytes(layer, k * sum(layer.job.matrix), 2) for k in range(len(energies) + 1)
        ]
        return RankCurve(energies, layer.norm, sizes)

    def _bytes(self, layer: Layer, numbers: int, tensors: int) -> int:
        """Bytes in the file: the numbers, and an estimate of their header entries."""
        assert layer.job.slot is not None
        stem = self.plan.keys.stem(layer.job.slot)
        return module_size(numbers, layer.job.dtype, stem, tensors, alpha=self.alpha)

    def _options(self, n: int) -> Iterator[tuple[str, int, float]]:
        """(kind, bytes, squared error) of every way to store a layer.

        Ways are none, LoRA of each rank, LoKr of each factor, and full. Those larger than the
        smallest one that leaves only noise are skipped.
        """
        layer, module = self.layers[n], self.signal[n]
        found = [
            ("lora" if k else "nothing", size, error)
            for k, (size, error) in enumerate(zip(module.sizes, module.errors(), strict=True))
        ]
        for energy, numbers in layer.captured.values():
            found.append(("lokr", self._bytes(layer, numbers, 2), max(0.0, layer.norm - energy)))
        found.append(("full", self._bytes(layer, math.prod(layer.job.matrix), 1), 0.0))
        noise = EXPLAINED * (layer.seen.noise if layer.seen else 0.0)
        enough = min(size for _, size, error in found if error <= noise)
        return (option for option in found if option[1] <= enough)

    def _choice(
        self, bytes: int, left: float, mix: Mapping[str, int] | None = None, gap: float = 0.0
    ) -> Point:
        return Point(bytes, math.sqrt((left + self.rest) / self.total), mix or {}, gap)

    def lora(self, ranks: Sequence[int]) -> Point:
        """LoRA with these ranks."""
        picked = list(zip(self.modules, ranks, strict=True))
        return self._choice(
            sum(m.sizes[k] for m, k in picked), sum(m.errors()[k] for m, k in picked)
        )

    def lora_within(self, bytes: int) -> Point:
        """LoRA with the best ranks within a size, at least that of the smallest layer at rank 1."""
        least = min(module.sizes[1] for module in self.signal if module.energies)
        return self.lora(Size(max(bytes, least)).choose(self.signal))

    def lokr(self, factor: int) -> Point:
        """LoKr everywhere, its second factor full."""
        size, left = 0, 0.0
        for layer in self.layers:
            # a layer that the factor does not divide is stored whole
            energy, numbers = layer.captured.get(factor, (layer.norm, math.prod(layer.job.matrix)))
            size, left = size + self._bytes(layer, numbers, 2), left + max(0.0, layer.norm - energy)
        return self._choice(size, left)

    def auto(self, bytes: int) -> Point:
        """The best way for each layer."""
        found = least_error(
            [[(size, error) for _, size, error in one] for one in self.options], bytes
        )
        mix: dict[str, int] = {}
        for one, which in zip(self.options, found.chosen, strict=True):
            mix[one[which][0]] = mix.get(one[which][0], 0) + 1
        whole = self._choice(found.bytes, found.error, mix)
        least = math.sqrt((max(0.0, found.bound) + self.rest) / self.total)
        gap = 1.0 - least / whole.relative_error if whole.relative_error else 0.0
        return self._choice(found.bytes, found.error, mix, max(0.0, gap))


def _distinct(choices: Mapping[int, Point]) -> dict[int, Point]:
    """The first of the factors that divide every layer alike."""
    first: dict[int, int] = {}
    for factor, choice in choices.items():
        first.setdefault(choice.bytes, factor)
    return {factor: choices[factor] for factor in first.values()}
