"""Several differences made one, entry by entry: trimmed, thinned out at random, or by elected signs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["mix", "thinned", "trimmed"]

CHUNK = (
    1 << 22
)  # random numbers drawn at a time, always on the CPU so that every device drops the same entries


def mix(deltas: Sequence[Tensor], method: str, density: float, seeds: Sequence[str]) -> Tensor:
    """One difference (m, n) of several weighted ones.

    magnitude: the share `density` of largest entries of each is kept, and they are added. dare: each entry is kept with
    that probability and divided by it (Yu et al., arXiv:2311.03099), then added. ties: trimmed, then where signs differ the one
    with the larger sum wins and the entries that have it are averaged (Yadav et al., arXiv:2306.01708). dare-ties: thinned out
    at random in place of trimmed. `seeds`, one for each difference, decide what dare drops.
    """
    if method in ("dare", "dare-ties"):
        kept = [thinned(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)]
    elif method in ("ties", "magnitude"):
        kept = [trimmed(delta, density) for delta in deltas]
    else:
        raise ValueError(f"unknown method {method!r}")
    return _elected(kept) if method.endswith("ties") else torch.stack(kept).sum(0)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The ⌈density · entries⌉ entries of largest magnitude, the first of equal ones; zero elsewhere."""
    flat = delta.flatten()
    count = min(flat.numel(), int(-(-density * flat.numel() // 1)))
    if count >= flat.numel():
        return delta
    index = flat.abs().sort(descending=True, stable=True).indices[:count]
    result = torch.zeros_like(flat)
    result[index] = flat[index]
    return result.reshape(delta.shape)


def thinned(delta: Tensor, density: float, seed: str) -> Tensor:
    """Each entry with probability `density`, divided by it; zero elsewhere. Equal seeds drop equal entries on any device."""
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
    """The mean of the entries that have the sign with the larger sum; zero entries have no vote."""
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
