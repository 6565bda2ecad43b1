"""Gram matrices of stacks on accelerators: in float64 if small, else from exact float32 products.

Consumer GPUs compute float64 at 1/64 of their float32 rate. A float32 number is the sum of three
of at most nine bits (Ozaki, Ogita, Oishi and Rump 2012, "Error-free transformations of matrix
multiplication"). Their products, summed over 256 rows, are exact in float32, and TF32 keeps them
too. The sums are added in float64. That takes nine float32 products instead of one of float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram_of_stack"]

# multiplications of a member up to which float64 takes at most 0.2 ms on a consumer GPU (est.)
SMALL = 1 << 27
ROWS = 256  # two numbers of 2⁸ at most: 256 of their products are at most 2²⁴
ROOM = 1 << 25  # numbers of partial sums at a time: 128 MB
# x + c − c rounds |x| < 2 to multiples of 2⁻⁷, and what that leaves to multiples of 2⁻¹⁵
ROUNDERS = 1.5 * 2.0**16, 1.5 * 2.0**8


def gram_of_stack(a: Tensor) -> Tensor:
    """AᵀA (..., N, N) of a (..., M, N) in float64, as exact as if A were rounded first.

    By 2⁻²⁵ of the largest entry of each column at most.
    """
    rows, columns = a.shape[-2:]
    if a.dtype != torch.float32 or rows * columns**2 <= SMALL:
        wide = a.to(torch.float64)
        return wide.mT @ wide
    flat = a.reshape(-1, rows, columns)
    at_once = max(1, ROOM // (9 * columns**2))
    some = min(len(flat), at_once)
    found = [_split_gram(flat[n : n + some], at_once) for n in range(0, len(flat), some)]
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole.reshape(*a.shape[:-2], columns, columns)


def _split_gram(a: Tensor, at_once: int) -> Tensor:
    """AᵀA (B, N, N) of a (B, M, N); `at_once` is how many partial sums fit in memory."""
    batch, rows, columns = a.shape
    unit = _octaves(torch.linalg.vector_norm(a, float("inf"), dim=-2, keepdim=True))
    parts = torch.cat(_slices(a / unit), -1)
    if rows % ROWS:
        parts = torch.nn.functional.pad(parts, (0, 0, 0, -rows % ROWS))
    blocks = parts.reshape(batch, -1, ROWS, 3 * columns)
    step = max(1, at_once // batch)
    total = None
    for start in range(0, blocks.shape[1], step):
        some = blocks[:, start : start + step]
        sums = (some.mT @ some).sum(1, dtype=torch.float64)
        total = sums if total is None else total + sums
    assert total is not None
    folded = total.reshape(batch, 3, columns, 3, columns).sum((1, 3))
    wide = unit.to(torch.float64)
    return folded.mul_(wide).mul_(wide.mT)


def _octaves(x: Tensor) -> Tensor:
    """2^⌊log₂ x⌋ of x ≥ 0 in float32 from its exponent bits, at least the least normal number."""
    whole = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return whole.clamp_min(torch.finfo(torch.float32).tiny)


def _slices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in (−2, 2) as a sum of three: of nine, eight and the remaining bits."""
    first = (x + ROUNDERS[0]).sub_(ROUNDERS[0])
    rest = x - first
    second = (rest + ROUNDERS[1]).sub_(ROUNDERS[1])
    return first, second, rest.sub_(second)
