"""compare: how far apart two adapters are, whatever their formats and algorithms; or how much of one a checkpoint contains."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.engine import Step, check_memory
from adaptkit.errors import AdaptkitError, NothingToDo
from adaptkit.ops.compare.distance import Numbers
from adaptkit.ops.compare.inputs import Argument, Given, Inputs, open_inputs
from adaptkit.ops.compare.matching import Base, Match, of_adapters, of_checkpoint
from adaptkit.ops.compare.measure import Measurer, needs_base
from adaptkit.ops.shared import Closing, Progress, Shared, Unused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["ModuleDistance", "Options", "Plan", "Report", "plan", "run"]


@dataclass(frozen=True)
class Options:
    """What to compare; `base` is the checkpoint that the adapters are for, or that the other checkpoint was made from."""

    base: Path | None = None
    tolerance: float | None = None
    family: str | None = None
    format: str | None = None
    device: str = "auto"
    memory: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan(Closing):
    """Everything known before a weight is read."""

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
    """One module that both sides have. `strength`: the one at which the adapter stands in the checkpoint."""

    module: str
    relative_error: float | None
    norm_a: float | None
    norm_b: float | None
    cosine: float | None
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """‖A − B‖ / ‖B‖ of two adapters; of an adapter and a checkpoint ‖D − ΔW‖ / ‖ΔW‖, with D = tuned − base for norm_b.

    Over everything (against a checkpoint: all modules of the adapter), over what both have (`relative_error_common`), and by module. None
    stands for what has no value, or depends on weights that are not there. `strength` is ⟨D, ΔW⟩ / ‖ΔW‖², ΔW at strength 1;
    `outside` the share of ‖D‖² in layers that the adapter does not touch, of which `only_b` names those that changed.
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
    tolerance: float | None = None
    unclaimed: int = 0
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exceeded(self) -> str | None:
        """Why the tolerance is not kept; None where it is, or where there is none."""
        if self.tolerance is None:
            return None
        if self.relative_error is None:
            return f"there is no relative error to hold against the tolerance of {self.tolerance:g}"
        if self.relative_error > self.tolerance:
            return f"the relative error {self.relative_error:.6g} exceeds the tolerance of {self.tolerance:g}"
        if self.unclaimed:
            return f"{self.unclaimed} keys are not understood, so the tolerance of {self.tolerance:g} may not be kept"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every number finite or null; `strength` and `outside` against a checkpoint only."""
        against = {"strength": self.strength, "outside": self.outside} if self.checkpoint else {}
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


# planning --------------------------------------------------------------------------------------------------------


def plan(a: Argument, b: Argument, options: Options) -> Plan:
    """Find what stands beside what; reads headers only, and fails here if anything can."""
    if options.tolerance is not None and not 0.0 <= options.tolerance < math.inf:
        raise AdaptkitError(f"a tolerance of {options.tolerance:g} is no number from 0 on")
    inputs = open_inputs(a, b, options.base, family=options.family, format=options.format)
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
            others, hint="see --only, --skip and `adaptkit inspect --modules` on both"
        )
    for match in matches:
        _check_base(match)
    worker = Measurer(inputs.base, inputs.tuned)
    steps = tuple(worker.step(match) for match in matches)
    check_memory(steps, options.memory)
    return Plan(inputs, options, tuple(matches), steps, tuple(unused))


def _check_base(match: Match) -> None:
    """NotRepresentable where the base is missing that a module cannot do without: all but modules that may be equal."""
    for side in match.sides:
        if side.entry is not None and not side.entry.kind.additive and side.base is None:
            kinds = {other.entry and other.entry.kind for other in match.sides}
            strengths = {other.given.strength for other in match.sides}
            if not match.both or len(kinds) > 1 or len(strengths) > 1:
                raise needs_base(side.entry, match.label)


# running ---------------------------------------------------------------------------------------------------------


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Measure every module; the only part that reads weights."""
    started = time.perf_counter()
    found: dict[int, Numbers] = {}
    worker, total = Measurer(plan.inputs.base, plan.inputs.tuned), len(plan.steps)

    def store(match: Match, numbers: Numbers) -> None:
        found[match.number] = numbers

    try:
        engine.run(
            plan.steps,
            engine.Work(worker.load, worker.work, store, held=lambda _: 0),
            engine.Resources.choose(plan.options.device, plan.options.memory),
            None if progress is None else lambda done: progress(done, total),
        )
    finally:
        plan.close()
    return _report(
        plan,
        [(match, found[match.number]) for match in plan.matches],
        time.perf_counter() - started,
    )


def _report(plan: Plan, found: Sequence[tuple[Match, Numbers]], seconds: float) -> Report:
    inputs = plan.inputs
    against = inputs.tuned is not None
    both = [(match, numbers) for match, numbers in found if match.both]
    common = _sum(numbers for _, numbers in both)
    total = _sum(numbers for match, numbers in found if match.mine or not against)
    outside = sum(numbers.b for match, numbers in found if match.mine is None and match.counted)
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
        notes=tuple(_notes(total, both, against)),
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
    """The strength at which the adapter by itself stands in the checkpoint."""
    if inputs.tuned is None or numbers.fitted is None:
        return None
    return inputs.a.strength * numbers.fitted


def _notes(total: Numbers, both: Sequence[tuple[Match, Numbers]], against: bool) -> Iterator[str]:
    unknown = sum(not numbers.known for _, numbers in both)
    if unknown:
        modules = "1 module is" if unknown == 1 else f"{unknown} modules are"
        yield f"{modules} equal; how much they change depends on the weights they are applied to, which --base gives."
    if total.known and total.error > 0.0 and (total.a if against else total.b) == 0.0:
        yield f"{'A' if against else 'B'} changes nothing, so there is no error relative to it."
