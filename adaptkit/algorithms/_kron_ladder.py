"""What a LoKr with a truncated second factor leaves of a difference, for every rank.

With M the best w2 for this w1, what M leaves of the difference is orthogonal to all its ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.algorithms._factor import Product

__all__ = ["ladder_errors", "ladder_errors_of_stack"]


def ladder_errors(delta: Tensor, w1: Tensor, w2: Product, scale: float) -> tuple[float, ...]:
    """‖delta − scale · w1 ⊗ w2‖² with w2 cut to ranks 0, 1, …

    delta: (a·c, b·d)   w1: (a, b)   w2: (c, d). Only the first one if w1 is zero.
    """
    from adaptkit.linalg.kron.blocks import rearrange
    from adaptkit.linalg.lowrank import truncation_errors
    from adaptkit.linalg.precision import norm_squared

    w1 = w1.to(delta.dtype)  # stored in fp64, the difference may be fp32
    if not (size := float(norm_squared(w1))):
        return (float(norm_squared(delta)),)
    left, right = w2.left.to(delta.dtype), w2.right.to(delta.dtype)
    r = rearrange(delta, *w1.shape[-2:])
    best = (w1.reshape(1, -1) @ r / size).reshape(left.shape[-2], right.shape[-1])
    rest = float(norm_squared(r.addmm_(w1.reshape(-1, 1), best.reshape(1, -1), alpha=-1.0)))
    errors = truncation_errors(best, left * scale, right)
    return tuple((rest + size * errors).tolist())


def ladder_errors_of_stack(delta: Tensor, w1: Tensor, w2: Product, scale: float) -> Tensor:
    """The same of each member of a stack (one leading dimension), (B, ranks + 1), without a look.

    ‖delta‖² at every rank if w1 is zero.
    """
    from adaptkit.linalg.kron.blocks import rearrange
    from adaptkit.linalg.lowrank import truncation_errors_of_stack
    from adaptkit.linalg.precision import norm_squared

    w1 = w1.to(delta.dtype)
    left, right = w2.left.to(delta.dtype), w2.right.to(delta.dtype)
    r = rearrange(delta, *w1.shape[-2:])
    row, size = w1.flatten(-2).unsqueeze(-2), norm_squared(w1)
    inverse = size.clamp_min(1e-60).reciprocal().to(delta.dtype)[:, None, None]
    best = (row @ r).mul_(inverse)
    rest = norm_squared(r.baddbmm_(row.mT, best, alpha=-1.0))
    second = best.reshape(-1, left.shape[-2], right.shape[-1])
    errors = truncation_errors_of_stack(second, left * scale, right)
    return rest.unsqueeze(-1) + size.unsqueeze(-1) * errors
