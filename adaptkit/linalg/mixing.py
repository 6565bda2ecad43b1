"""Combine several differences entry by entry: magnitude, DARE, TIES."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["mix", "thinned", "trimmed"]

# random numbers drawn at a time, on the CPU, so that all devices drop the same entries
CHUNK = 1 << 22
PIECE = 1 << 16  # entries at a time of what needs several copies


def mix(deltas: Iterable[Tensor], method: str, density: float, seeds: Sequence[str]) -> Tensor:
    """Combine weighted differences (m, n) into one.

    magnitude: keep the share `density` of largest entries of each, and add. dare: keep each entry
    with that probability, divide it by it, and add (Yu et al., arXiv:2311.03099). ties: trim as
    magnitude does, elect the sign with the larger sum, and average its entries (Yadav et al.,
    arXiv:2306.01708). dare-ties: the same with dare's random dropping instead of trimming. `seeds`,
    one per difference, determine what dare drops.
    """
    if method in ("dare", "dare-ties"):
        kept = [thinned(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)]
    elif method in ("ties", "magnitude"):
        kept = [trimmed(delta, density) for delta in deltas]
    else:
        raise ValueError(f"unknown method {method!r}")
    return _elected(kept) if method.endswith("ties") else _sum(kept)


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Keep the ⌈density · entries⌉ largest entries; zero the others."""
    flat = delta.flatten()
    count = min(flat.numel(), int(-(-density * flat.numel() // 1)))
    if count >= flat.numel():
        return delta
    least, result = _size_of(flat, count), torch.zeros_like(flat)
    larger = [int((piece.abs() > least).sum()) for piece in _pieces(flat)]
    room = count - sum(larger)
    for piece, kept in zip(_pieces(flat), _pieces(result), strict=True):
        sizes = piece.abs()
        equal = sizes == least
        # of equal entries the first ones
        keep = (sizes > least) | (equal & (equal.cumsum(0) <= room))
        room -= min(room, int(equal.sum()))
        kept.copy_(torch.where(keep, piece, 0.0))
    return result.reshape(delta.shape)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE]


def _size_of(flat: Tensor, place: int) -> float:
    """The magnitude of the entry at this place, from 1, among all by magnitude."""
    sizes = flat.abs()
    last = sizes.numel() - place
    if sizes.device.type != "cpu":
        return float(sizes.kthvalue(last + 1).values)
    array = sizes.numpy()
    array.partition(last)  # in place
    return float(array[last])


def thinned(delta: Tensor, density: float, seed: str) -> Tensor:
    """Keep each entry with probability `density`, divided by it; zero the others.

    Equal seeds drop equal entries on any device.
    """
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    flat = delta.flatten()
    result = torch.zeros_like(flat)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        keep = torch.rand(piece.numel(), generator=generator) < density
        result[start : start + CHUNK] = torch.where(keep.to(piece.device), piece / density, 0.0)
    return result.reshape(delta.shape)


def _elected(kept: Sequence[Tensor]) -> Tensor:
    """Average the entries of the sign with the larger sum.

    Zero entries have no vote.
    """
    result = torch.empty_like(kept[0])
    pieces = zip(*(_pieces(delta.flatten()) for delta in kept), strict=True)
    for made, parts in zip(_pieces(result.view(-1)), pieces, strict=True):
        sign = sum(parts[1:], start=parts[0]).sign()
        count, mean = torch.zeros_like(sign), torch.zeros_like(sign)
        for part in parts:
            agrees = (part.sign() == sign) & (sign != 0)
            mean += torch.where(agrees, part, 0.0)
            count += agrees
        made.copy_(mean / count.clamp_min(1.0))
    return result
