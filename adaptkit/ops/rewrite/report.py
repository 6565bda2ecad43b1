"""The report of a rewritten adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.keymap import split_suffix
from adaptkit.ops.adapter_file.finite import non_finite
from adaptkit.ops.adapter_file.peft_config import BIASED
from adaptkit.ops.rewrite.plan import CHANGES, Copied, Recast, Task, detail
from adaptkit.ops.shared import POOR, WriterReport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.ops.rewrite.plan import Dropped
    from adaptkit.ops.rewrite.state import State


__all__ = ["Report", "dropped_norm", "losses", "report_of", "total_error"]


@dataclass(frozen=True, repr=False, kw_only=True)
class Report(WriterReport):
    """The adapter that was written. `changes` counts the slots by what was done to them."""

    family: str
    source_format: str
    format: str
    changes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    unread: int = 0  # keys of weights that no table names: what they change is unknown

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        extra = {
            "family": self.family,
            "from": self.source_format,
            "to": self.format,
            "changes": dict(self.changes),
            "notes": list(self.notes),
            **({"unread": self.unread} if self.unread else {}),
        }
        return {**super().to_dict(), **extra}


def report_of(
    plan: Recast, state: State, size: int, seconds: float, measured: float | None = None
) -> Report:
    """The report of a finished run."""
    lost = losses(plan, state)
    error = total_error(plan, state, lost)
    written = [stored for task in plan.tasks if (stored := state.outcome(task)) is not None]
    return Report(
        output=plan.output,
        bytes=size,
        modules=len(written),
        parameters=sum(stored.parameters for stored in written),
        relative_error=error,
        unused=plan.unused,
        selection=plan.left_out,
        seconds=seconds,
        measured=measured,
        details=tuple(
            _detail(state, task, found) for task, found in zip(plan.tasks, lost, strict=True)
        ),
        family=plan.adapter.family.name,
        source_format=plan.spellings[0],
        format=plan.spellings[1],
        changes=_changes(plan, state),
        notes=(
            *plan.notes,
            *_broken(plan, state),
            *_poor(plan, error),
            *_notes(plan, state),
        ),
        unread=_unread(plan),
    )


def _changes(plan: Recast, state: State) -> dict[str, int]:
    """How many slots were renamed, resized, …

    Slots that might have been resized also count as unchanged or left out.
    """
    found: Counter[str] = Counter()
    for task in plan.tasks:
        changes = task.changes or {plan.plainly(task)}
        if state.dropped(task):
            changes = {"left out"}
        elif task.ranked and task.number not in state.stored:
            changes = task.changes - {"resized"} or {"unchanged"}
        found.update(changes)
    return {name: found[name] for name in (*CHANGES, "unchanged", "left out") if found[name]}


def total_error(
    plan: Recast, state: State, lost: Sequence[tuple[float, float] | None]
) -> float | None:
    """The relative error over all modules; None if it depends on a base that is not given."""
    if any(_unknown(state, task) for task in plan.tasks) or _unread(plan):
        return None
    dropped = dropped_norm(plan)
    if dropped is None:
        return None
    error = sum(found[1] for found in lost if found is not None) + dropped
    norm = sum(found[0] for found in lost if found is not None) + dropped
    if not error:
        return 0.0
    norm += sum(_untouched(state, task) for task in plan.tasks)
    return float((error / norm) ** 0.5) if norm else 0.0


def dropped_norm(plan: Recast) -> float | None:
    """‖ΔW‖² of the modules that the new format has no place for; None without the base weight."""
    left = [_without_place(plan, one) for one in plan.dropped]
    return None if None in left else sum(norm for norm in left if norm is not None)


def _without_place(plan: Recast, one: Dropped) -> float | None:
    """‖ΔW‖² of a module that the new format has no place for; None without the base weight."""
    weights = one.adapter.weights(one.entry)
    if weights.additive:
        return one.weight**2 * weights.norm_squared()
    if plan.base is None:
        return None
    slot = one.entry.slot
    pieces = plan.base.locate(slot, plan.base.targets().get(slot.target, {}))
    return None if pieces is None else _moved(weights, plan.base.read(pieces), one.weight)


def _moved(weights: Weights, weight: Tensor, strength: float = 1.0) -> float:
    """‖W' − W‖² of weights applied to a base weight."""
    base = weight.double()
    return float((weights.apply(base.clone(), strength) - base).square().sum())


def _unread(plan: Recast) -> int:
    """The number of keys of weights that were left out since no table names them."""
    return sum(
        split_suffix(key) is not None for adapter in plan.adapters for key in adapter.unclaimed
    )


def _unknown(state: State, task: Task) -> bool:
    """Whether a change was made that only the base weight can measure, which is not given."""
    if state.dropped(task):
        return not task.entries[0].kind.additive and task.base is None
    stored = state.stored.get(task.number)
    return stored is not None and stored.error is None


def losses(plan: Recast, state: State) -> list[tuple[float, float] | None]:
    """‖ΔW‖² and what was lost of it, of every task; None where nothing was computed."""
    return [_loss(state, task) for task in plan.tasks]


def _loss(state: State, task: Task) -> tuple[float, float] | None:
    """‖ΔW‖² and what was lost of it; None if nothing was computed, or without the base weight."""
    if state.dropped(task) and not task.entries[0].kind.additive:
        norm = _norm(state, task)
        return None if task.base is None else (norm, norm)
    stored, found = state.stored.get(task.number), state.decomposed.get(task.number)
    if stored is not None and stored.norm is not None and stored.error is not None:
        return stored.norm, stored.error
    if found is None or not task.kind.additive:
        return None  # the norm of a direction is not that of what it changes
    return found.norm, found.norm if state.dropped(task) else 0.0


def _untouched(state: State, task: Task) -> float:
    """‖ΔW‖² of a module that is copied: errors are relative to the whole adapter."""
    taken = task.number in state.decomposed and task.kind.additive
    return 0.0 if taken or not state.copied(task) else _norm(state, task)


def _norm(state: State, task: Task) -> float:
    """‖ΔW‖² of one module as its input has it; 0 if it depends on a base that is not given."""
    weights = task.terms[0].job.adapter.weights(task.entries[0])
    if weights.additive:
        return weights.norm_squared()
    if task.base is None or state.plan.base is None:
        return 0.0
    return _moved(weights, state.plan.base.read(task.base))


def _detail(state: State, task: Task, lost: tuple[float, float] | None) -> dict[str, Any]:
    stored = state.outcome(task)
    error = (
        None
        if lost is None and task.number in state.stored
        else (lost[1] / lost[0]) ** 0.5
        if lost and lost[0] and lost[1]
        else 0.0
    )
    if stored is None:
        return {**detail(task, None if _unknown(state, task) else 1.0, 0), "change": "left out"}
    found = {**detail(task, error, stored.rank), "algorithm": stored.kind.name}
    if task.ranked:
        found["rank_before"] = task.entries[0].facts.rank
    return found


def _poor(plan: Recast, error: float | None) -> Iterator[str]:
    """A note on a result that is far from its inputs."""
    if error is not None and error > POOR:
        ranked = plan.policy is not None
        more = "a higher rank or size keeps more" if ranked else "--algo lora or full keeps more"
        yield f"relative error {error:.2g}: much of the adapter is lost; {more}."


def _broken(plan: Recast, state: State) -> Iterator[str]:
    """A note on tensors that were copied although their numbers are none."""
    found: list[str] = []
    for number, adapter in enumerate(plan.adapters):
        ready = (item for task in plan.tasks if state.copied(task) for item in task.ready or ())
        names = [x.source for x in ready if isinstance(x, Copied) and x.number == number]
        found += non_finite(adapter.source, names)
    if found:
        count = "1 tensor holds" if len(found) == 1 else f"{len(found)} tensors hold"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{count} NaN or infinity, copied as it is: {found[0]}{more}."


def _by_part(plan: Recast, state: State) -> str:
    """How many modules of each part are left out, where there are several parts."""
    of = Counter(task.slot.component for task in plan.tasks)
    out = Counter(task.slot.component for task in plan.tasks if state.dropped(task))
    if len(of) < 2:
        return ""
    return f" ({', '.join(f'{out[part]} of {count} in {part}' for part, count in of.items())})"


def _notes(plan: Recast, state: State) -> Iterator[str]:
    dropped = sum(1 for task in plan.tasks if state.dropped(task))
    if dropped:
        verb = "is" if dropped == 1 else "are"
        yield (
            f"{dropped} of {len(plan.tasks)} modules {verb} left out{_by_part(plan, state)}: "
            "their share of ΔW is not worth its bytes."
        )
    zero = sum(1 for stored in state.stored.values() if stored.zero)
    if zero:
        where = "every module" if zero == len(plan.tasks) else f"{zero} modules"
        yield f"ΔW is zero in {where}: the inputs cancel out."
    if any(plan.keys.beside_lora(task.slot) for task in plan.tasks):
        yield BIASED
    vanished = sum(stored.vanished for stored in state.stored.values())
    if vanished:
        yield (
            f"{vanished:,} numbers became zero in rounding; the error counts that. "
            "--dtype bf16 or fp32 keeps them."
        )
    ranked = [task for task in plan.tasks if task.number in state.decomposed]
    if ranked and not any(task.number in state.stored for task in ranked) and not dropped:
        yield "nothing was cut: every module has no more rank than that."
    directions = sum(
        1
        for task in ranked
        if not task.kind.additive and task.number in state.stored and task.base is None
    )
    if directions:
        yield (
            f"{directions} DoRA modules: their directions were resized and their magnitudes kept; "
            "how far the merged weights move depends on the checkpoint. --base measures it."
        )
    wide = sum(1 for stored in state.stored.values() if stored.kind.too_wide(stored.shapes))
    if wide:
        yield (
            f"{wide} modules take more than their full difference would; "
            "--rank or --size makes them smaller."
        )
