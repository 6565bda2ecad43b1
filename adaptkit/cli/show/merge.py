"""Summary of `merge`."""

from __future__ import annotations

from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adaptkit.cli.show.text import counts, human

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import merge
    from adaptkit.ops.merge.verify import Verified

__all__ = ["merged"]

# share of ‖ΔW‖ lost to rounding that deserves a note
_LOSSY = 0.1


def merged(talk: Talk, report: merge.Report) -> None:
    """Print the summary of a merge."""
    each = "\n".join(
        f"{PurePath(a['path']).name} × {a['strength']:g}: {a['modules']} modules"
        for a in report.adapters
    )
    rows = [
        ("adapters", each),
        (
            "tensors",
            f"{report.tensors_changed} of {report.tensors} changed, "
            f"‖ΔW‖/‖W‖ = {report.relative_change:.3g} over these",
        ),
        ("blocks", _strongest(report.blocks)),
        ("weights", "\n".join(_weighted(report.block_weights))),
        ("rounding", f"{report.relative_error:.3g} of ‖ΔW‖ lost to the number format"),
        ("verified", _verified(report.verified)),
        ("files", counts(dict.fromkeys(report.files, 0), "{0}")),
        ("size", human(report.bytes)),
    ]
    notes = [
        f"not in the output: {path} (a copy of the weights before the merge)"
        for path in report.left_out
    ]
    notes += report.notes
    if report.relative_error > _LOSSY:
        wider = "bf16 or fp16" if report.quantised else "fp32"
        which = f" ({report.quantised} tensors are quantised)" if report.quantised else ""
        notes.append(
            f"rounding is {report.relative_error:.0%} of ‖ΔW‖{which}; --dtype {wider} is more "
            "accurate"
        )
    talk.written(
        report, rows, ("algorithm", "rank", "strength", "relative_change", "module"), notes
    )


def _strongest(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Return ‖ΔW‖/‖W‖ of the blocks that changed most."""
    changed = [block for block in blocks if block["tensors_changed"]]
    first = sorted(changed, key=lambda block: -(block["relative_change"] or 0.0))[:3]
    shown = " · ".join(f"{b['block']} {b['relative_change'] or 0.0:.3g}" for b in first)
    return f"{len(changed)} of {len(blocks)} changed, most: {shown}" if changed else ""


def _weighted(rules: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe each rule of --blocks; join neighbours of a vector that have equal weights."""
    for weight, group in groupby(rules, key=lambda rule: (rule["weight"], rule.get("vector"))):
        held = list(group)
        for part in [held] if weight[1] else [[rule] for rule in held]:
            names = " ".join(rule["rule"] for rule in part)
            yield f"{names} = {weight[0]:g}: {sum(rule['modules'] for rule in part)} modules"


def _verified(found: Verified | None) -> str:
    if found is None:
        return ""
    return (
        f"{found.merged} tensors equal base + ΔW within one rounding, "
        f"{found.copied} are identical to the base"
    )
