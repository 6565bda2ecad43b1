"""Choose the ranks of an extraction, and report what the adapter captures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adaptkit.algorithms.contract import FitSpec
from adaptkit.errors import NothingToDo, NotRepresentable
from adaptkit.formats.contract import Alpha
from adaptkit.keymap.kinds import extractable
from adaptkit.ops.adapter_file.peft_config import BIASED
from adaptkit.ops.extract.output import Output, Stored
from adaptkit.ops.extract.plan import (
    AUTO,
    DEFAULT_FACTOR,
    Options,
    Plan,
    has_ladder,
    has_ranks,
)
from adaptkit.ops.extract.random import is_random
from adaptkit.ops.extract.same_size import SameSize, about_size, same_size
from adaptkit.ops.ranks.forms import Fitted, Layer, Pick, choose, choose_any
from adaptkit.ops.ranks.options import MAX_RANK
from adaptkit.ops.shared import POOR, Unused, WriterReport

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.difference.probe import Probe
    from adaptkit.ops.ranks.rules.contract import Policy


__all__ = ["Report"]


VECTORS = "--vectors"  # in the reason of a layer that this option would store


@dataclass(frozen=True, repr=False, kw_only=True)
class Report(WriterReport):
    """The adapter that was written, the share of the difference that it captures, and notes.

    `layers_compared_with_lora` is the number of layers that `captured_by_lora_of_same_size` was
    measured on, None if on all.
    """

    relative_error: float
    family: str
    format: str
    algorithm: str
    captured: float
    unchanged: int
    captured_by_lora_of_same_size: float | None = None
    layers_compared_with_lora: int | None = None
    notes: tuple[str, ...] = ()
    left_out: int = 0
    noise_floor: float = 0.0
    made_by: Mapping[str, Any] | None = None
    optimality_gap: float | None = None
    ranks_below_noise: int | None = None

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
        for name in (
            "ranks_below_noise",
            "optimality_gap",
            "captured_by_lora_of_same_size",
            "layers_compared_with_lora",
        ):
            if getattr(self, name) is not None:
                extra[name] = getattr(self, name)
        return {**super().to_dict(), **extra}


@dataclass
class Result:
    """The measured layers, and what is stored of each.

    `noise` counts the stored ranks of all ladders: those within rounding noise, and all.
    `lost` are the layers that rounding would leave no nearer to ΔW than nothing: never stored.
    """

    plan: Plan
    probe: Probe
    measured: list[tuple[Pair, Fitted]]
    picks: dict[int, Pick | None] = field(default_factory=dict)
    gap: float | None = None
    all_signal: bool = False
    noise: tuple[int, int] | None = None
    lost: frozenset[int] = frozenset()

    @property
    def fitted(self) -> list[tuple[Pair, Fitted]]:
        """The layers that differ and may be stored."""
        return [(job, found) for job, found in self.measured if found.forms]

    @property
    def norm(self) -> float:
        """‖Δ‖² over everything that both files hold, whether an adapter can hold it or not."""
        return sum(found.norm for _, found in self.measured)

    def picked(self) -> list[tuple[Pair, Pick | None]]:
        """The layers that may be stored, each with its pick."""
        return [(job, self.picks[job.number]) for job, _ in self.fitted]

    def choose(self) -> None:
        """Pick a form and a rank for every layer; none where nothing is nearer to ΔW."""
        self._choose()
        worse = {
            job.number: job.dtype
            for job, found in self.fitted
            if (pick := self.picks[job.number]) and pick.error >= found.norm
        }
        if worse and not self.stored(besides=worse.keys()):
            dtype = next(iter(worse.values()))
            raise NotRepresentable(
                f"the layers differ by too little for {dtype}: rounded, they would be no nearer to "
                "the difference than nothing is",
                hint="write with --dtype bf16 or fp32",
                file=self.plan.tuned.source.path,
            )
        self.lost = frozenset(worse)
        self.picks |= dict.fromkeys(worse)

    def _choose(self) -> None:
        changed = [(job, found) for job, found in self.measured if found.norm > 0]
        if not self.fitted:
            raise NothingToDo(
                _nothing(changed),
                hint="are these the two files you meant?",
                file=self.plan.tuned.source.path,
            )
        options, rule = self.plan.options, self.plan.policy
        free = [(job, found) for job, found in self.fitted if has_ranks(job)]
        self.picks = {job.number: Pick(found.forms[0], 0) for job, found in self.fitted}
        if not has_ladder(options) or rule is None or not free:
            return
        layers = [self._layer(job, found) for job, found in free]
        mine = {job.number for job, _ in free}
        others = [
            (self.picks.get(job.number), found)
            for job, found in self.measured
            if job.number not in mine
        ]
        rest = sum(found.norm if pick is None else pick.error for pick, found in others)
        measure = self._measure([job for job, _ in free])
        try:
            if options.algo == AUTO:
                chosen_ = choose_any(layers, rest, (rule.most_bytes, rule.most_error), measure)
            else:
                chosen_ = choose(layers, rest, rule, measure)
        except NotRepresentable as error:
            if error.hint is not None and self._vectors_help(rest, rule):
                error.hint = f"--vectors stores biases and norms; {error.hint}"
            raise error.at(file=self.plan.tuned.source.path) from None
        self.gap, self.all_signal = chosen_.gap, chosen_.all_signal
        self.picks |= {job.number: pick for (job, _), pick in zip(free, chosen_.picks, strict=True)}
        self.noise = _noise_ranks(pick for pick in chosen_.picks if pick is not None)

    def _vectors_help(self, rest: float, rule: Policy) -> bool:
        """Whether storing biases and norms may reach the error asked for."""
        held = sum(found.norm for job, found in self.measured if VECTORS in job.why)
        return rule.most_error is not None and rest - held <= rule.most_error**2 * self.norm

    def _layer(self, job: Pair, found: Fitted) -> Layer:
        assert job.slot is not None
        alpha = self.plan.keys.format.alpha is Alpha.TENSOR
        convolution = any(n > 1 for n in job.shape[2:])
        return Layer(found, self.plan.keys.stem(job.slot), alpha=alpha, convolution=convolution)

    def _measure(self, pairs: Sequence[Pair]) -> Callable[[Sequence[Pick | None]], int]:
        """The exact size of the file for any choice of these pairs."""

        def size(picks: Sequence[Pick | None]) -> int:
            numbers = (pair.number for pair in pairs)
            picked = self.picks | dict(zip(numbers, picks, strict=True))
            return replace(self, picks=picked).output().size()

        return size

    def stored(self, besides: Container[int] = ()) -> list[tuple[Pair, Fitted, Pick]]:
        """The layers that go into the file, or would without some."""
        return [
            (job, found, pick)
            for job, found in self.fitted
            if (pick := self.picks[job.number]) and job.number not in besides
        ]

    def output(self) -> Output:
        """The file to write."""
        stored = []
        for pair, found, pick in self.stored():
            number = next(n for n, form in enumerate(found.forms) if form is pick.form)
            stored.append(Stored(pair, pick, number))
        return Output(self.plan, stored, self.relative_error)

    @property
    def residual(self) -> float:
        """‖Δ − stored‖² over everything that both files hold."""
        stored = self.stored()
        held = all(job.algorithm for job, found in self.measured if found.norm > 0)
        if held and len(stored) == len(self.fitted):  # no subtraction, so no cancellation
            return max(0.0, sum(pick.error for _, _, pick in stored))
        return max(0.0, self.norm - sum(found.norm - pick.error for _, found, pick in stored))

    @property
    def relative_error(self) -> float:
        """‖Δ − stored‖ / ‖Δ‖."""
        return float((self.residual / self.norm) ** 0.5)

    def report(self) -> Report:
        """Everything but the size of the file and the time."""
        plan = self.plan
        changed = [(job, found) for job, found in self.measured if found.norm > 0]
        left = [
            Unused(job.label, f"differs, but {job.why}")
            for job, _ in changed
            if job.algorithm is None
        ]
        stored = self.stored()
        beside = same_size(stored)
        return Report(
            output=plan.output,
            bytes=0,
            modules=len(stored),
            parameters=sum(pick.form.numbers(pick.rank) for _, _, pick in stored),
            relative_error=self.relative_error,
            unused=(*plan.unused, *left),
            selection=plan.selection,
            details=tuple(_detail(job, found, pick) for job, found, pick in stored),
            family=plan.base.family.name,
            format=plan.keys.format.name,
            algorithm=plan.options.algo,
            captured=max(0.0, 1.0 - self.residual / self.norm),
            unchanged=sum(1 for job, found in self.measured if found.norm == 0 and job.algorithm),
            captured_by_lora_of_same_size=beside and beside.lora,
            layers_compared_with_lora=beside.looked if beside and beside.partial else None,
            left_out=len(self.fitted) - len(stored),
            noise_floor=self.probe.floor,
            made_by=self.probe.made,
            optimality_gap=self.gap,
            ranks_below_noise=self.noise and self.noise[0],
            notes=(*plan.notes, *_notes(plan.options, beside, left, self)),
        )


def _nothing(changed: Sequence[tuple[Pair, Fitted]]) -> str:
    if not changed:
        return "nothing differs between the base and the tuned checkpoint"
    first = changed[0][0].label
    return (
        f"no layer that an adapter can hold differs; {len(changed)} other tensors do, first {first}"
    )


def _detail(job: Pair, found: Fitted, pick: Pick) -> dict[str, Any]:
    rank, error = pick.stored_rank, max(0.0, pick.error)
    detail: dict[str, Any] = {
        "module": job.label,
        "algorithm": pick.form.kind.name,
        "rank": rank,
        "relative_error": (error / found.norm) ** 0.5,
        "captured": max(0.0, 1.0 - error / found.norm),
        "norm": found.norm**0.5,
    }
    if found.lora is not None:
        detail["captured_by_lora_of_same_size"] = min(1.0, found.lora / found.norm)
    return detail


def _noise_ranks(picks: Iterable[Pick]) -> tuple[int, int]:
    """How many of the stored ranks lie within the rounding noise, and how many there are."""
    ladders = [(pick.rank, pick.form.signal) for pick in picks if pick.form.ladder]
    return sum(max(0, rank - signal) for rank, signal in ladders), sum(rank for rank, _ in ladders)


def _notes(
    options: Options, beside: SameSize | None, left: Sequence[Unused], result: Result
) -> Iterator[str]:
    yield from _about(options, result)
    kind = extractable().get(options.algo)
    if beside is not None and kind is not None:
        yield from about_size(kind.title, beside)
    if kind is not None:
        factor = options.factor or result.probe.factor or DEFAULT_FACTOR
        if caution := kind.caution(FitSpec(factor=factor)):
            yield caution
    keys = result.plan.keys
    if any(job.slot and keys.beside_lora(job.slot) for job, _, _ in result.stored()):
        yield BIASED
    yield from _about_random(result)
    told = beside is not None and beside.lora > beside.kept
    if result.relative_error > POOR and not told:
        yield (
            f"relative error {result.relative_error:.2g}: `adaptkit advise` shows what more ranks "
            "or another algorithm would hold."
        )
    if left:
        count = "1 changed tensor is" if len(left) == 1 else f"{len(left)} changed tensors are"
        share = sum(found.norm for job, found in result.measured if job.algorithm is None)
        yield (
            f"{count} not in the adapter, and counted in the error: {share / result.norm:.3g} of "
            "‖ΔW‖². `unused` lists them with the reasons; --skip leaves them out of the figures."
        )


def _about(options: Options, result: Result) -> Iterator[str]:
    """Notes on what made the difference, and on what was left out."""
    yield from _about_origin(options, result.probe)
    if result.all_signal:
        yield (
            "only this much stands out of the rounding noise: "
            "the size asked for is not filled with noise."
        )
    if result.noise and result.noise[0]:
        within, ranks = result.noise
        yield (
            f"{within} of {ranks} ranks lie within the rounding noise of the checkpoint; "
            "--size leaves such ranks out."
        )
    if result.lost:
        verb = "is" if len(result.lost) == 1 else "are"
        yield (
            f"{len(result.lost)} of {len(result.fitted)} changed layers {verb} left out: rounded, "
            "they would be no nearer to the difference than nothing is. --dtype bf16 or fp32 "
            "holds them."
        )
    dropped = sum(1 for _, pick in result.picked() if pick is None) - len(result.lost)
    if dropped:
        verb = "is" if dropped == 1 else "are"
        yield (
            f"{dropped} of {len(result.fitted)} changed layers {verb} left out: "
            "their share is not worth its bytes."
        )
    if has_ladder(options) and options.max_rank is None and options.size is None:
        yield from _about_highest(result)


def _about_random(result: Result) -> Iterator[str]:
    """A note if modules of one rank hold no more than random numbers would."""
    fixed = [
        is_random(*job.matrix, pick.stored_rank, 1.0 - pick.error / found.norm)
        for job, found, pick in result.stored()
        if pick.stored_rank and pick.form.kind.low_rank and not pick.form.ladder
    ]
    if any(fixed):
        yield (
            f"{sum(fixed)} of {len(fixed)} modules hold no more of their difference than they "
            "would of random numbers, as rounding leaves them; --size leaves such modules out."
        )


def _about_origin(options: Options, probe: Probe) -> Iterator[str]:
    """A note if a merged adapter made the difference, and another kind or rank is extracted."""
    kind = extractable().get(options.algo)
    factored = kind is not None and "factor" in kind.fit_options
    low_rank = probe.rank is not None and (factored or (options.rank or 0) != probe.rank)
    product = probe.factor is not None and kind is not None and kind.low_rank
    if low_rank or product:
        yield from probe.notes()


def _about_highest(result: Result) -> Iterator[str]:
    """A note if layers end at the last rank of their ladder."""
    picks = (pick for _, pick in result.picked() if pick is not None and pick.form.ladder)
    highest = sum(pick.rank == len(pick.form.errors) - 1 == MAX_RANK for pick in picks)
    if highest:
        yield (
            f"{highest} layers have the highest rank considered, {MAX_RANK}; --max-rank raises it."
        )
