"""Small float64 problems of a stack on a device, solved on the host: one copy there, one back.

CUDA decomposes the members of a stack one after the other (pytorch#175585), and consumer GPUs
compute float64 at 1/64 of their rate. The host solves each member in a thread of its own.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from adaptkit.process import one_thread_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["DEPENDENT", "Ritz", "coefficients", "fetched", "leading_pairs", "on_host", "stacked"]

R = TypeVar("R")

THREADS = 16  # at most: a stack has few members
# of the largest eigenvalue of VᵀV: below it, float32 rounding of A·V is what a direction holds.
# 1e-8 to 1e-5 give the same errors on spectra that mislead, 1e-10 a third more on steep ones.
DEPENDENT = 1e-6


@cache
def _pool() -> ThreadPoolExecutor:
    threads = min(THREADS, os.cpu_count() or 1)
    return ThreadPoolExecutor(threads, "adaptkit-host", initializer=one_thread_here)


def on_host(function: Callable[..., R], *stacks: Tensor) -> tuple[R, ...]:
    """`function` of each member of host stacks (B, …), in a thread of its own."""

    def one(*member: Tensor) -> R:
        with torch.inference_mode():
            return function(*member)

    return tuple(_pool().map(one, *(stack.unbind() for stack in stacks)))


def fetched(*numbers: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, …) of one device on the host in float64: one copy of all, and one wait."""
    wide = [x.reshape(len(x), -1).to(torch.float64) for x in numbers]
    whole = torch.cat(wide, 1).cpu() if len(wide) > 1 else wide[0].cpu()
    parts = torch.split(whole, [x.shape[1] for x in wide], 1)
    return tuple(part.reshape(x.shape) for part, x in zip(parts, numbers, strict=True))


class Ritz(NamedTuple):
    """Eigenvalues (k,), descending, and coefficients (c, k) of vectors in a basis V (·, c)."""

    values: Tensor
    vectors: Tensor


def leading_pairs(basis: Tensor, image: Tensor, count: int, dependent: float = DEPENDENT) -> Ritz:
    """The leading solutions of (image) y = θ (basis) y, for VᵀV and VᵀAᵀAV (c, c) in float64.

    V may be dependent, and of any scale: its columns are brought to unit length, and directions of
    less than `dependent` are left out. Zeros if V is zero or not finite.
    """
    lengths = basis.diagonal()
    alive = torch.isfinite(lengths) & (lengths > 0)
    unit = torch.where(alive, lengths, 1.0).rsqrt() * alive
    sides = unit.unsqueeze(-1) * unit
    basis, image = (torch.nan_to_num(x * sides, 0.0, 0.0, 0.0) for x in (basis, image))
    values, vectors = torch.linalg.eigh(basis)
    kept = values > dependent * values[-1:].clamp_min(0.0)
    whitened = vectors * torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    found, turned = torch.linalg.eigh(whitened.mT @ image @ whitened)
    found, turned = found.flip(-1)[:count].clamp_min(0.0), turned.flip(-1)[:, :count]
    return Ritz(found, unit.unsqueeze(-1) * (whitened @ turned))


def coefficients(basis: Tensor, image: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """σ (k,), and multipliers (c, k) of Y = A·X and of X that give u and v of A within span X.

    `basis` is XᵀX, `image` YᵀY, both (c, c) in float64. u of a σ that vanishes is zero.
    """
    found = leading_pairs(basis, image, count)
    s = found.values.sqrt()
    alive = s > 1e-7 * s[:1]  # a float64 Gram matrix resolves σ down to about 1e-8 σ₁
    inverse = torch.where(alive, torch.where(alive, s, 1.0).reciprocal(), 0.0)
    return torch.where(alive, s, 0.0), found.vectors * inverse, found.vectors


def stacked(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of `on_host`, each as one stack."""
    return tuple(torch.stack(part) for part in zip(*found, strict=True))
