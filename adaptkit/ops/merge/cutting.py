"""The rows of an adapter's module that one tensor of the checkpoint holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.keymap.kinds import applied, dense_kind, rows_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.merge.plan import Contribution

__all__ = ["WHOLE", "Deltas", "Part", "once", "part_of", "whole_slot"]

WHOLE = "slot"  # beside the roles of a module: all rows of its layer


@dataclass(frozen=True)
class Part:
    """Weights that are added to rows [start, stop) of a tensor; equal `origin`, equal weights."""

    weights: Weights
    start: int
    stop: int
    origin: Hashable

    def add(self, whole: Tensor, strength: float) -> None:
        """Add to the whole tensor (..., m, n)."""
        applied(self.weights, whole[..., self.start : self.stop, :], strength)

    def change(self, rows: Tensor, first: int, last: int, strength: float) -> None:
        """Apply a kind that is `row_wise` to rows [first, last) of the tensor, (..., k, n)."""
        applied(self.weights.part(first - self.start, last - self.start), rows, strength)

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return the rows within [first, last) that are added to, possibly an empty range."""
        return max(first, self.start), min(last, self.stop)

    def delta(self, first: int, last: int) -> Tensor:
        """Return ΔW (..., last - first, n) of these rows of the tensor."""
        if (first, last) == (self.start, self.stop):
            return self.weights.delta()
        return self.weights.some_rows(first - self.start, last - self.start)


class Deltas:
    """A cache of ΔW of a block of rows, for outputs that add the same weights."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.uses = Counter(part.origin for part in parts)
        self.kept: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(self, part: Part, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return (ΔW, ‖ΔW‖²) of these rows of the current block."""
        from adaptkit.linalg.precision import norm_squared

        if part.origin in self.kept:
            return self.kept[part.origin]
        delta = part.delta(first, last)
        found = delta, norm_squared(delta).cpu()
        if self.uses[part.origin] > 1:
            self.kept[part.origin] = found
        return found

    def clear(self) -> None:
        """Drop the cached deltas of the block."""
        self.kept.clear()


def once(known: dict[Hashable, Part], part: Part) -> Part:
    """The part of this origin, with what all of its rows need computed once."""
    if part.origin not in known:
        known[part.origin] = replace(part, weights=part.weights.computed())
    return known[part.origin]


def whole_slot(base: Checkpoint, c: Contribution) -> dict[str, Tensor]:
    """The weight of the whole layer, if a contribution needs it."""
    return {WHOLE: base.read(c.slot)} if c.slot else {}


def part_of(
    weights: Weights, c: Contribution, whole: Tensor | None, adapters: Sequence[Adapter]
) -> Weights:
    """The weights of the rows that a contribution adds to, whatever their kind.

    What a DoRA on its input axis or a rotation makes of some rows depends on all of them, so it is
    applied to `whole`, the layer's weight in float32 or wider. Raises NotRepresentable without it:
    another adapter changes the layer first.
    """
    if c.bias:
        assert whole is not None
        weights = weights.on_bias(whole)
        return rows_of(weights, *c.cut) if c.cut else weights
    if c.columns:
        import torch

        delta = weights.delta()
        missing = c.columns - int(delta.shape[-1])
        weights = dense_kind().holding(torch.nn.functional.pad(delta, (0, missing)), ())
    if c.cut is None:
        return weights
    try:
        return rows_of(weights, *c.cut)
    except NotRepresentable as error:
        if whole is None:
            error.hint = "name this adapter first, or merge it alone"
            raise error.at(file=adapters[c.adapter].source.path, tensor=c.label) from None
    start, stop = c.cut
    changed = weights.apply(whole.clone(), 1.0).sub_(whole)
    return dense_kind().holding(changed[..., start:stop, :].clone(), ())
