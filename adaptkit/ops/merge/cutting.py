"""The rows of an adapter's module that one tensor of the checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.keymap.kinds import dense_kind, rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.merge.plan import Contribution

__all__ = ["WHOLE", "part_of", "whole_slot"]

WHOLE = "slot"  # beside the roles of a module: all rows of its layer


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
