"""Report of a merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from adaptkit.files.header import BLOCKED
from adaptkit.files.quantized import FP8
from adaptkit.ops.blocks import block_of
from adaptkit.ops.merge.kernel import Merged
from adaptkit.ops.shared import WriterReport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adaptkit.ops.merge.plan import Contribution, Plan, TensorMerge
    from adaptkit.ops.merge.verify import Verified

__all__ = ["Report"]


@dataclass(frozen=True, repr=False, kw_only=True)
class Report(WriterReport):
    """Report of a merge; `relative_change` is ‖ΔW‖/‖W‖ over the tensors with modules.

    `blocks` has the same numbers per block, `block_weights` the modules of each rule of
    `--blocks`. `left_out` lists files of the base's folder that are not in the output, because
    they duplicate the weights before the merge.
    """

    relative_error: float
    family: str
    adapters: tuple[Mapping[str, Any], ...]
    tensors: int
    tensors_changed: int
    relative_change: float
    blocks: tuple[Mapping[str, Any], ...] = ()
    block_weights: tuple[Mapping[str, Any], ...] = ()
    verified: Verified | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    quantised: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        extra = {
            "family": self.family,
            "adapters": [dict(item) for item in self.adapters],
            "tensors": self.tensors,
            "tensors_changed": self.tensors_changed,
            "relative_change": self.relative_change,
            "blocks": [dict(item) for item in self.blocks],
            "block_weights": [dict(item) for item in self.block_weights],
            "verified": None if self.verified is None else self.verified.to_dict(),
            "files": list(self.files),
            "left_out": list(self.left_out),
            "quantised": self.quantised,
            "notes": list(self.notes),
        }
        return {**super().to_dict(), **extra}


ONLY_WEIGHTS = (
    "the folder holds weights only; take the config.json files from any diffusers folder of this "
    "model"
)
SMALL = (*FP8, *BLOCKED)
STRONG = 0.5  # ‖ΔW‖/‖W‖; adapters that are used stay below a tenth
UNCHANGED = Merged({}, 0.0, 0.0, 0.0)


def report_of(
    plan: Plan, found: Mapping[str, Merged], verified: Verified | None, seconds: float
) -> Report:
    """Make the report from the results of the computed tensors."""
    results = {merge.name: found.get(merge.name, UNCHANGED) for merge in plan.merges}
    delta = sum(result.delta for result in results.values())
    # the error counts only the layers with an adapter, not those that only change the dtype
    rounding = sum(result.rounding for result in results.values())
    weight = sum(result.weight for result in results.values())
    written = (
        (plan.output / path for path in plan.layout.files())
        if plan.layout.folder
        else [plan.output]
    )
    return Report(
        output=plan.output,
        bytes=sum(path.stat().st_size for path in written),
        modules=sum(len(merge.contributions) for merge in plan.merges),
        parameters=sum(math.prod(spec.shape) for spec in plan.specs),
        relative_error=_ratio(rounding, delta) or 0.0,
        unused=plan.unused,
        selection=plan.left_out,
        seconds=seconds,
        details=tuple(
            _detail(merge, c, results[merge.name])
            for merge in plan.merges
            for c in merge.contributions
        ),
        family=plan.base.family.name,
        adapters=tuple(plan.described()),
        tensors=len(plan.specs),
        tensors_changed=sum(1 for result in results.values() if result.delta > 0),
        relative_change=_ratio(delta, weight) or 0.0,
        blocks=tuple(_by_block(plan, results)),
        block_weights=plan.rules,
        verified=verified,
        files=tuple(plan.layout.files()),
        left_out=plan.layout.left_out,
        notes=(*_odd(results, _ratio(delta, weight) or 0.0), *_notes(plan)),
        quantised=sum(merge.changes and merge.dtype in SMALL for merge in plan.merges),
    )


def _odd(results: Mapping[str, Merged], change: float) -> Iterator[str]:
    """A note on a merge that is rarely meant."""
    if change > STRONG:
        yield (
            f"‖ΔW‖/‖W‖ is {change:.2g}, far more than an adapter changes: is the strength right, "
            "and is alpha (`adaptkit inspect`)?"
        )
    if not any(result.delta > 0 for result in results.values()):
        yield "nothing changed: every strength or every ΔW is 0."


def _notes(plan: Plan) -> Iterator[str]:
    if plan.layout.folder and plan.layout.moves:
        yield ONLY_WEIGHTS
    padded = {c.label: c for merge in plan.merges for c in merge.contributions if c.columns}
    for label, c in padded.items():
        yield (
            f"{label}: the adapter changes {c.entry.facts.columns} of {c.columns} inputs; "
            "the others stay as they are"
        )
    ordered = sum(map(_depends_on_order, plan.merges))
    if ordered:
        yield (
            f"the order of the adapters counts in {ordered} of {len(plan.merges)} tensors: each is "
            "applied to the result of those before it"
        )


def _depends_on_order(merge: TensorMerge) -> bool:
    """Whether a change that depends on the weight meets another on the same rows."""
    active = [c for c in merge.contributions if c.strength]
    return any(
        not (a.entry.kind.additive and b.entry.kind.additive) and _overlap(a.rows, b.rows)
        for a, b in combinations(active, 2)
    )


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


def _ratio(part: float, whole: float) -> float | None:
    """Return √(part / whole) of sums of squares, or None if the whole is 0."""
    return (part / whole) ** 0.5 if whole else None


def _detail(merge: TensorMerge, c: Contribution, result: Merged) -> dict[str, Any]:
    return {
        "module": c.label,
        "tensor": merge.name,
        "algorithm": c.entry.kind.name,
        "rank": c.entry.facts.rank,
        "strength": c.strength,
        "relative_error": _ratio(result.rounding, result.delta) or 0.0,
        "relative_change": _ratio(result.delta, result.weight),
    }


def _by_block(plan: Plan, results: Mapping[str, Merged]) -> Iterator[dict[str, Any]]:
    """Yield the changed tensors and ‖ΔW‖/‖W‖ of each block, in the order of the base."""
    blocks: dict[str, list[TensorMerge]] = {}
    for merge in plan.merges:
        c = merge.contributions[0]
        blocks.setdefault(block_of(c.label, c.entry.slot.component), []).append(merge)
    for block, merges in blocks.items():
        found = [results[merge.name] for merge in merges]
        yield {
            "block": block,
            "tensors": len(merges),
            "tensors_changed": sum(result.delta > 0 for result in found),
            "relative_change": _ratio(sum(r.delta for r in found), sum(r.weight for r in found)),
        }
