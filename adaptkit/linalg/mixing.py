"""Combine several differences entry by entry: magnitude, DARE, TIES."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["mix", "thinned", "trimmed"]

# random numbers drawn at a time, on the CPU, so that all devices drop the same entries
CHUNK = 1 << 22


def mix(deltas: Sequence[Tensor], method: str, density: float, seeds: Sequence[str]) -> Tensor:
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
    return _elected(kept) if method.endswith("ties") else torch.stack(kept).sum(0)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Keep the ⌈density · entries⌉ largest entries; zero the others."""
    flat = delta.flatten()
    count = min(flat.numel(), int(-(-density * flat.numel() // 1)))
    if count >= flat.numel():
        return delta
    index = flat.abs().sort(descending=True, stable=True).indices[:count]
    result = torch.zeros_like(flat)
    result[index] = flat[index]
    return result.reshape(delta.shape)


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
    total = kept[0].clone()
    for delta in kept[1:]:
        total += delta
    sign = total.sign()
    count, mean = torch.zeros_like(total), torch.zeros_like(total)
    for delta in kept:
        agrees = (delta.sign() == sign) & (sign != 0)
        mean += torch.where(agrees, delta, 0.0)
        count += agrees
    return mean / count.clamp_min(1.0)
