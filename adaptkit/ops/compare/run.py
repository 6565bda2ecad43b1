"""compare: distance of two adapters or checkpoints, or the share of an adapter in a checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.errors import AdaptkitError, NothingToDo
from adaptkit.ops.compare import checkpoints
from adaptkit.ops.compare.distance import Numbers
from adaptkit.ops.compare.inputs import Argument, Given, Inputs, open_inputs
from adaptkit.ops.compare.matching import Base, Match, of_adapters, of_checkpoint
from adaptkit.ops.compare.measure import Measurer, needs_base
from adaptkit.ops.shared import Brief, Closing, Shared, Unused, biased, settle
from adaptkit.ops.stages import Progress, counting, logged
from adaptkit.steps import Step, check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["ModuleDistance", "Options", "Plan", "Report", "plan", "run"]


@dataclass(frozen=True)
class Options:
    """Options of compare; `base` is the adapters' checkpoint or the origin of the other one."""

    base: Path | None = None
    tolerance: float | None = None
    family: str | None = None
    format: str | None = None
    device: str = "auto"
    memory: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    alpha_in: str | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, repr=False)
class Plan(Closing):
    """The state of a comparison before any weight is read."""

    inputs: Inputs
    options: Options
    matches: tuple[Match, ...]
    steps: tuple[Step[Match], ...]
    unused: tuple[Unused, ...]

    def close(self) -> None:
        """Close all inputs."""
        self.inputs.close()


@dataclass(frozen=True)
class ModuleDistance:
    """Distance of one common module; `strength` is the adapter's in the checkpoint."""

    module: str
    relative_error: float | None
    norm_a: float | None
    norm_b: float | None
    cosine: float | None
    strength: float | None = None


@dataclass(frozen=True, repr=False, kw_only=True)
class Report(Brief):
    """Distances in total, over the common modules and per module.

    Two adapters A and B have the relative error ‖A − B‖ / ‖B‖. An adapter and a checkpoint have
    ‖D − ΔW‖ / ‖ΔW‖ with D = tuned − base, in total over the modules of the adapter; norm_b is
    ‖D‖. `strength` is ⟨D, ΔW⟩ / ‖ΔW‖² with ΔW at strength 1. `outside` is the share of ‖D‖² in
    layers that are not in the adapter; `only_b` names the changed ones among them. Two checkpoints
    have ‖A − B‖ / ‖B‖ of their weights, and `differ` counts the layers that are not equal. A number
    is None if it is undefined or depends on weights that were not given.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    family: str
    relative_error: float | None
    relative_error_common: float | None
    cosine: float | None
    norm_a: float | None
    norm_b: float | None
    modules: tuple[ModuleDistance, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    base: str | None = None
    checkpoint: bool = False
    strength: float | None = None
    outside: float | None = None
    differ: int | None = None
    tolerance: float | None = None
    unclaimed: int = 0
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exceeded(self) -> str | None:
        """Return why the tolerance is not met; None if it is met or not set."""
        if self.tolerance is None:
            return None
        if self.relative_error is None:
            return f"no relative error to compare with the tolerance of {self.tolerance:g}"
        if self.relative_error > self.tolerance:
            return (
                f"the relative error {self.relative_error:.6g} exceeds the tolerance of "
                f"{self.tolerance:g}"
            )
        if self.unclaimed:
            return (
                f"{self.unclaimed} keys are unknown, so the tolerance of {self.tolerance:g} may be "
                "exceeded"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document: finite numbers or null.

        Only a comparison with a checkpoint has `strength` and `outside`, and only that of two
        checkpoints `differ`.
        """
        against = {"strength": self.strength, "outside": self.outside} if self.checkpoint else {}
        against |= {} if self.differ is None else {"differ": self.differ}
        return {
            "a": dict(self.a),
            "b": dict(self.b),
            "base": self.base,
            "family": self.family,
            "relative_error": self.relative_error,
            "relative_error_common": self.relative_error_common,
            "cosine": self.cosine,
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            **against,
            "tolerance": self.tolerance,
            "within_tolerance": None if self.tolerance is None else self.exceeded is None,
            "modules": [self._module(one) for one in self.modules],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "unused": [item.to_dict() for item in self.unused],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }

    def _module(self, one: ModuleDistance) -> dict[str, Any]:
        names = (
            "module",
            "relative_error",
            "norm_a",
            "norm_b",
            "cosine",
            *(("strength",) if self.checkpoint else ()),
        )
        return {name: getattr(one, name) for name in names}


# planning


def plan(a: Argument, b: Argument, options: Options) -> Plan | checkpoints.Plan:
    """Match the modules of both sides; read headers only, and report all errors here."""
    if options.tolerance is not None and not 0.0 <= options.tolerance < math.inf:
        raise AdaptkitError(f"tolerance must be >= 0, got {options.tolerance:g}")
    if options.base is None and checkpoints.both_checkpoints(a, b):
        names = ("family", "memory", "only", "skip")
        chosen = Shared(**{name: getattr(options, name) for name in names})
        return checkpoints.plan(a, b, chosen, options.tolerance)
    inputs = open_inputs(
        a,
        b,
        options.base,
        family=options.family,
        format=options.format,
        alpha=options.alpha_in,
    )
    try:
        return _planned(inputs, options)
    except AdaptkitError:
        inputs.close()
        raise


def _planned(inputs: Inputs, options: Options) -> Plan:
    select = Shared(only=options.only, skip=options.skip)
    if inputs.b is not None:
        matches, unused = of_adapters(inputs.a, inputs.b, Base(inputs.base), select)
    else:
        assert inputs.base is not None
        assert inputs.tuned is not None
        matches, unused = of_checkpoint(inputs.a, (inputs.base, inputs.tuned), select)
    matches = [replace(match, number=n) for n, match in enumerate(matches)]
    if not any(match.both for match in matches):
        others = (
            "these adapters have no module in common"
            if inputs.b
            else "no module of this adapter is in the checkpoint"
        )
        raise NothingToDo(
            others, hint="check --only and --skip, and `adaptkit inspect --modules` on both files"
        )
    for match in matches:
        _check_base(match)
    worker = Measurer(inputs.base, inputs.tuned)
    steps = tuple(worker.step(match) for match in matches)
    check_memory(steps, options.memory)
    return Plan(inputs, options, tuple(matches), steps, tuple(unused))


def _check_base(match: Match) -> None:
    """Raise NotRepresentable if a non-additive module needs a base and may not be equal."""
    for side in match.sides:
        if side.entry is not None and not side.entry.kind.additive and side.base is None:
            kinds = {other.entry and other.entry.kind for other in match.sides}
            strengths = {other.given.strength for other in match.sides}
            if not match.both or len(kinds) > 1 or len(strengths) > 1:
                raise needs_base(side.entry, match.label)


# running


def run(plan: Plan | checkpoints.Plan, progress: Progress | None = None) -> Report:
    """Read the weights and measure every module."""
    started = time.perf_counter()
    if isinstance(plan, checkpoints.Plan):
        return _of_checkpoints(plan, progress, started)
    found: dict[int, Numbers] = {}
    worker = Measurer(plan.inputs.base, plan.inputs.tuned)

    def store(match: Match, numbers: Numbers) -> None:
        found[match.number] = numbers

    options = plan.options
    resources = engine.Resources.choose(options.device, options.memory, gains=False)
    try:
        with logged("compare", progress) as told:
            notes = engine.run(
                worker.steps_on(resources.device, plan.steps),
                engine.Work(worker.load, worker.work, store, held=lambda _: 0),
                resources,
                counting(told, "comparing", len(plan.steps), "modules"),
            )
    finally:
        plan.close()
    both = [(match, found[match.number]) for match in plan.matches]
    report = _report(plan, both, time.perf_counter() - started)
    return replace(report, notes=(*report.notes, *notes))


def _of_checkpoints(plan: checkpoints.Plan, progress: Progress | None, started: float) -> Report:
    every, notes = checkpoints.measured(plan, progress)
    total = _sum(numbers for _, numbers in every)
    both = [(layer.label, n) for layer, n in every if layer.a and layer.b]
    common = _sum(n for _, n in both)
    a, b = plan.described()
    return Report(
        a=a,
        b=b,
        family=plan.b.family.name,
        relative_error=total.over_b,
        relative_error_common=common.over_b,
        cosine=total.cosine,
        norm_a=total.norm_a,
        norm_b=total.norm_b,
        modules=tuple(
            ModuleDistance(label, n.over_b, n.norm_a, n.norm_b, n.cosine) for label, n in both
        ),
        only_a=tuple(layer.label for layer, _ in every if not layer.b),
        only_b=tuple(layer.label for layer, _ in every if not layer.a),
        differ=sum(n.error > 0.0 for _, n in both),
        tolerance=plan.tolerance,
        unclaimed=len(plan.unused),
        unused=plan.unused,
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _report(plan: Plan, found: Sequence[tuple[Match, Numbers]], seconds: float) -> Report:
    inputs = plan.inputs
    against = inputs.tuned is not None
    both = [(match, numbers) for match, numbers in found if match.both]
    common = _sum(numbers for _, numbers in both)
    total = _sum(numbers for match, numbers in found if match.mine or not against)
    outside = sum(numbers.b for match, numbers in found if match.mine is None)
    only_b = [
        match.label
        for match, numbers in found
        if match.mine is None and (numbers.b > 0.0 or not against)
    ]
    return Report(
        a=_described(inputs.a),
        b=_described(inputs.b)
        if inputs.b
        else {"path": str(inputs.tuned and inputs.tuned.source.path)},
        family=inputs.a.adapter.family.name,
        relative_error=total.over_a if against else total.over_b,
        relative_error_common=common.over_a if against else common.over_b,
        cosine=total.cosine,
        norm_a=total.norm_a,
        norm_b=total.norm_b,
        modules=tuple(_module(match.label, numbers, inputs) for match, numbers in both),
        only_a=tuple(match.label for match, _ in found if match.mine and not match.both),
        only_b=tuple(only_b),
        base=None if inputs.base is None else str(inputs.base.source.path),
        checkpoint=against,
        strength=_strength(total, inputs),
        outside=outside / (outside + total.b) if against and outside + total.b > 0.0 else None,
        tolerance=plan.options.tolerance,
        unclaimed=sum(len(given.adapter.unclaimed) for given in (inputs.a, inputs.b) if given),
        unused=plan.unused,
        notes=(*_notes(total, both, against), *_biases(both)),
        seconds=seconds,
    )


def _sum(numbers: Iterator[Numbers]) -> Numbers:
    return sum(numbers, Numbers())


def _described(given: Given) -> dict[str, Any]:
    adapter = given.adapter
    return {
        "path": str(adapter.source.path),
        "strength": given.strength,
        "format": adapter.format.name,
        "algorithms": adapter.algorithms(),
    }


def _module(label: str, numbers: Numbers, inputs: Inputs) -> ModuleDistance:
    against = inputs.tuned is not None
    error = numbers.over_a if against else numbers.over_b
    strength = _strength(numbers, inputs)
    return ModuleDistance(label, error, numbers.norm_a, numbers.norm_b, numbers.cosine, strength)


def _strength(numbers: Numbers, inputs: Inputs) -> float | None:
    """Return the strength at which the checkpoint contains the adapter."""
    if inputs.tuned is None or numbers.fitted is None:
        return None
    return inputs.a.strength * numbers.fitted


def _biases(both: Sequence[tuple[Match, Numbers]]) -> list[str]:
    return biased(side.entry for match, _ in both for side in match.sides if side.entry)


def _notes(total: Numbers, both: Sequence[tuple[Match, Numbers]], against: bool) -> Iterator[str]:
    unknown = sum(not numbers.known for _, numbers in both)
    if unknown:
        modules = "1 module is" if unknown == 1 else f"{unknown} modules are"
        yield f"{modules} equal; pass --base to measure the norm of their ΔW."
    if total.known and total.error > 0.0 and (total.a if against else total.b) == 0.0:
        yield f"ΔW of {'A' if against else 'B'} is zero, so there is no relative error."
