"""The orthogonal wavelets of Daubechies, and the inverse of their two-dimensional transform."""

from __future__ import annotations

import math
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["filters", "synthesised"]

MOST = 10  # vanishing moments of the wavelets that PEFT has
# the roots, by their size, whose inverses make the least asymmetric wavelets: a bit for each
SYMLETS: Mapping[int, int] = MappingProxyType(
    {2: 0, 3: 0, 4: 0b10, 5: 0b1, 6: 0b101, 7: 0b1, 8: 0b1010, 9: 0b110, 10: 0b10101}
)


@cache
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(low, high) of the synthesis with `db1` to `db10` or `sym2` to `sym10`; None for others.

    The low filter has the n-fold zero at −1 and half the other roots of the half-band polynomial
    of Daubechies (Ten Lectures on Wavelets, 6.1): those within the unit circle (`db`), or the
    choice that is the most symmetric (`sym`, 8.1.1). Exact to 1e-11.
    """
    family, number = name[:-2], name[-2:]
    if not number.isdecimal():
        family, number = name[:-1], name[-1:]
    moments = int(number) if number.isdecimal() and number[0] != "0" else 0
    if family == "db" and 0 < moments <= MOST:
        low = _low(moments, 0)
    elif family == "sym" and moments in SYMLETS:
        low = _low(moments, SYMLETS[moments])
    else:
        return None
    return low, tuple((-1) ** n * one for n, one in enumerate(reversed(low)))


def _low(moments: int, inverted: int) -> tuple[float, ...]:
    import numpy as np

    powers = [math.comb(moments - 1 + k, k) for k in reversed(range(moments))]
    half = 1 - 2 * np.roots(powers)
    far = np.sqrt((half * half - 1).astype(complex))
    roots = np.where(abs(half + far) < 1, half + far, half - far)
    pairs = sorted(roots[roots.imag > -1e-9], key=abs)
    found = np.ones(1, dtype=complex)
    for _ in range(moments):
        found = np.convolve(found, [0.5, 0.5])
    for n, inner in enumerate(pairs):
        root = 1 / inner if inverted >> n & 1 else inner
        for one in (root,) if abs(root.imag) < 1e-9 else (root, root.conjugate()):
            found = np.convolve(found, np.array([1, -one]) / (1 - one))
    return tuple((math.sqrt(2) * found.real).tolist())


def synthesised(spectrum: Tensor, name: str) -> Tensor:
    """The inverse transform of one level of `spectrum` (..., 2a, 2b), (..., 2a − t, 2b − t).

    Its quarters are the low parts, those high along the rows (upper right), along the columns
    (lower left) and along both; t = length of the filter − 2.
    """
    import torch

    known = filters(name)
    assert known is not None
    low, high = (torch.tensor(one, dtype=spectrum.dtype, device=spectrum.device) for one in known)
    tall, wide = spectrum.shape[-2] // 2, spectrum.shape[-1] // 2
    flat = spectrum.reshape(-1, *spectrum.shape[-2:])
    quarters = [flat[:, :tall, :wide], flat[:, :tall, wide:]]
    quarters += [flat[:, tall:, :wide], flat[:, tall:, wide:]]
    kernels = [torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))]
    found = torch.nn.functional.conv_transpose2d(
        torch.stack(quarters, 1), torch.stack(kernels).unsqueeze(1), stride=2
    )
    trim = len(low) - 2
    kept = found[:, 0, trim : found.shape[-2] - trim, trim : found.shape[-1] - trim]
    return kept.reshape(*spectrum.shape[:-2], *kept.shape[-2:])
