"""Stack the factors of several weights; factors that are equal are stored once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["grouped", "same", "stacked", "unique"]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit, or both missing."""
    import torch

    if one is None or other is None:
        return one is other
    return one is other or (
        one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    )


def stacked(parts: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Stack matrices (..., m, r) by rows, block-diagonal by group.

    Members of a group share its columns and have equal r. `groups` numbers the group of each
    part, from 0 in the order of first appearance.
    """
    import torch

    widths = {group: part.shape[-1] for part, group in zip(parts, groups, strict=True)}
    if len(widths) == 1:
        return torch.cat(list(parts), -2)
    rows = []
    for part, group in zip(parts, groups, strict=True):
        before = sum(width for other, width in widths.items() if other < group)
        after = sum(widths.values()) - before - part.shape[-1]
        rows.append(torch.nn.functional.pad(part, (before, after)))
    return torch.cat(rows, -2)


def grouped(parts: Sequence[Tensor]) -> list[int]:
    """The group of each part; equal tensors are one group."""
    firsts: list[Tensor] = []
    numbers: list[int] = []
    for part in parts:
        known = next((n for n, first in enumerate(firsts) if same(first, part)), None)
        if known is None:
            firsts.append(part)
        numbers.append(len(firsts) - 1 if known is None else known)
    return numbers


def unique(parts: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """The first part of each group, in order."""
    return [parts[groups.index(group)] for group in range(max(groups) + 1)]
