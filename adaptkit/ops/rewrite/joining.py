"""The parts of one adapter in a slot as one weight: rows are cut out and stacked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.keymap.kinds import dense_kind, low_rank_kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.respelling import Part

__all__ = ["differences", "joined"]


def joined(
    parts: Sequence[Part],
    whole: Sequence[Weights | None],
    into: type[Weights] | None,
    kernel: tuple[int, ...] | None,
) -> Weights:
    """Cut the rows of each part out of its weights and stack them in order.

    `whole` are the weights of the parts, None for rows of zeros. `into` is the kind that the result
    is stored as later, None if it keeps its own: some kinds have no rows of their own to cut or
    stack, but what becomes a LoRA or a difference anyway can be cut and stacked as one. Raises
    NotRepresentable for parts without a common form.
    """
    if len(parts) == 1 and parts[0].cut is None:
        assert whole[0] is not None
        return whole[0]
    refused: NotRepresentable | None = None
    for form in _forms(whole, into):
        try:
            one = whole if form is None else [w and form.exactly(w, kernel) for w in whole]
            found = _stacked(parts, one)
            if form is None or form.dense or found.thin_factors() is not None:
                return found
        except NotRepresentable as error:
            refused = refused or error
    assert refused is not None
    raise refused


def differences(
    parts: Sequence[Part], whole: Sequence[Weights | None], base: Tensor
) -> list[Weights | None]:
    """What each part changes in its rows of the base weight (rows, columns), as a difference.

    NotRepresentable for a part that is cut from a larger one: its base weight is not all here.
    """
    found: list[Weights | None] = []
    at = 0
    for part, weights in zip(parts, whole, strict=True):
        if weights is None:
            found.append(None)
            at += part.rows
            continue
        if part.cut is not None:
            raise NotRepresentable("a part of it depends on the rest of its base weight")
        # tensors of some kinds do not tell the rows; the base did
        rows = (part.entry.facts.rows if part.entry else 0) or weights.rows
        weight = base[at : at + rows]
        change = weights.apply(weight.clone(), 1.0) - weight
        found.append(dense_kind().holding(change, ()))
        at += rows
    return found


def _forms(
    whole: Sequence[Weights | None], into: type[Weights] | None
) -> Iterator[type[Weights] | None]:
    """The kinds to try in turn; None keeps that of the parts."""
    kinds = {type(weights) for weights in whole if weights is not None}
    if len(kinds) == 1:
        yield None
    if into is not None:
        if into.low_rank:
            yield low_rank_kind()
        yield dense_kind()


def _stacked(parts: Sequence[Part], whole: Sequence[Weights | None]) -> Weights:
    if len(parts) == 1 and whole[0] is not None and parts[0].cut is not None:
        return whole[0].own_part(*parts[0].cut)
    cut = [
        weights if weights is None or part.cut is None else weights.part(*part.cut)
        for part, weights in zip(parts, whole, strict=True)
    ]
    like = next(weights for weights in cut if weights is not None)
    filled = [
        like.zeros(like, part.rows) if weights is None else weights
        for weights, part in zip(cut, parts, strict=True)
    ]
    return type(like).fuse(filled)
