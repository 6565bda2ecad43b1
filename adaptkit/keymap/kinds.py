"""Algorithms by what they can do, so that no command asks for one by name."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import NETWORK
from adaptkit.errors import NotRepresentable
from adaptkit.keymap.roles import algorithms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights

__all__ = [
    "applied",
    "changed",
    "dense_kind",
    "extractable",
    "low_rank_kind",
    "network_module",
    "rows_of",
    "taking",
    "vector_kind",
    "wrapped_like",
]


@cache
def extractable() -> Mapping[str, type[Weights]]:
    """The kinds that can be fitted to a difference, in the order in which they are tried.

    Products of two factors come first and dense differences last; others by name between them.
    Of equally good forms of a layer the first is stored.
    """
    found = [kind for kind in algorithms().values() if kind.extractable]
    found.sort(key=lambda kind: (kind.dense, not kind.low_rank, kind.name))
    return {kind.name: kind for kind in found}


def low_rank_kind() -> type[Weights]:
    """The kind that stores any product of two factors exactly."""
    return _only(lambda kind: kind.low_rank)


def dense_kind() -> type[Weights]:
    """The kind that stores any difference exactly."""
    return _only(lambda kind: kind.dense)


def rows_of(weights: Weights, start: int, stop: int) -> Weights:
    """The weights of output rows [start, stop): of their own kind if that can be cut there.

    Otherwise ΔW is formed, and these rows of it are a difference. NotRepresentable if ΔW depends on
    the weight.
    """
    try:
        return weights.part(start, stop)
    except NotRepresentable:
        if not weights.additive:
            raise
        return dense_kind().holding(weights.delta()[..., start:stop, :].clone(), ())


def applied(weights: Weights, base: Tensor, strength: float) -> Tensor:
    """W + strength·ΔW, written into W (..., m, n), a block of rows at a time if the kind allows."""
    from adaptkit.linalg.precision import row_blocks

    blocks = [slice(0, base.shape[-2])] if not weights.row_wise else row_blocks(base)
    for rows in blocks:
        part = base[..., rows, :]
        own = weights.part(rows.start, rows.stop) if weights.row_wise else weights
        made = own.apply(part, strength)
        if made is not part:
            part.copy_(made)
    return base


def changed(weights: Weights, base: Tensor, strength: float) -> Tensor:
    """W' − W (..., m, n) in float64 for W in any dtype: no other wide matrix is made."""
    import torch

    from adaptkit.linalg.precision import row_blocks

    result = applied(weights, base.to(torch.float64, copy=True), strength)
    for rows in row_blocks(result):
        result[..., rows, :].sub_(base[..., rows, :])
    return result


def vector_kind() -> type[Weights]:
    """The kind that stores biases and the vectors of norms."""
    return _only(lambda kind: kind.vector_role(bias=True, norm=False) is not None)


def _only(holds: Callable[[type[Weights]], bool]) -> type[Weights]:
    return next(kind for kind in extractable().values() if holds(kind))


def taking(option: str) -> list[str]:
    """The names of the kinds that an option of `extract` is for."""
    return [name for name, kind in extractable().items() if option in kind.fit_options]


def wrapped_like(kind: type[Weights], inner: type[Weights]) -> type[Weights] | None:
    """Another kind inside the wrapper of this one; None if there is none."""
    if not kind.wrapper:
        return None
    same = (one for one in algorithms().values() if one.wrapper == kind.wrapper)
    return next((one for one in same if one.kind is inner), None)


def network_module(names: Iterable[str]) -> str:
    """The `ss_network_module` that loads a file of these algorithms."""
    modules = {algorithms()[name].network_module for name in names}
    return modules.pop() if len(modules) == 1 else NETWORK
