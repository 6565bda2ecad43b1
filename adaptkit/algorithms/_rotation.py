"""What the orthogonal kinds share: rotations out of stored blocks, and applying what is no difference.

Alpha of these kinds is no scale but a bound on the generator's norm, so `Facts.scale` carries it as it is stored.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cayley", "toward"]


def cayley(blocks: Tensor, bound: float = math.inf) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ for every block B of blocks (..., b, b), in float32 or wider.

    Where the norm of Q over all blocks together is larger than `bound`, Q is shortened to it (LyCORIS
    `modules/diag_oft.py: get_r`, sd-scripts `networks/oft.py`); so with a bound, the blocks must be those of one weight.
    """
    import torch

    from adaptkit.linalg.precision import upcast

    wide = upcast(blocks)
    generator = wide - wide.mT
    if bound < math.inf:
        norm = torch.linalg.vector_norm(generator) + 1e-8
        generator = generator * torch.clamp(bound / norm, max=1.0)
    eye = torch.eye(blocks.shape[-1], dtype=wide.dtype, device=wide.device)
    turned: Tensor = torch.linalg.solve(eye - generator, eye + generator, left=False)
    return turned


def toward(base: Tensor, merged: Tensor, strength: float) -> Tensor:
    """W + strength · (W' − W), written into `base`: what a strength means for kinds that are no difference."""
    return base.copy_(merged) if strength == 1.0 else base.lerp_(merged, strength)
