"""Random numbers that PEFT draws again when it loads a file, from a seed, on the CPU."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["kaiming", "permuted"]


@lru_cache(maxsize=4)
def permuted(numbers: int, count: int, seed: int) -> Tensor:
    """The first `count` of a random permutation of `numbers`."""
    import torch

    drawn = torch.randperm(numbers, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].clone()


def kaiming(shape: tuple[int, ...], slope: float, generator: Any, dtype: Any) -> Tensor:
    """Uniform within ±√(6 / ((1 + slope²) · n)), n the numbers of one row (He et al., 2015)."""
    import torch

    gain = math.sqrt(2.0 / (1 + slope**2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
