"""A stack of equal tensors merged in few launches, for devices: nothing waits for a result.

W is read in its stored dtype, the sum is taken in float32 (float64 beside float64) and rounded
once. A Kronecker product is added block by block, a LoRA as it is multiplied: no ΔW is formed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from adaptkit.staging.lanes import Later, back, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.linalg.fused import Contest
    from adaptkit.ops.merge.cutting import Part

__all__ = ["Merged", "coming", "merged", "together", "widened_factors"]

R = TypeVar("R")


class Merged(NamedTuple):
    """W' (b, m, n) as stored, and ‖W‖, ‖rounding‖ and ‖ΔW‖ / `unit`, (3, b).

    Without the last, (2, b), if ‖ΔW‖ is known.
    """

    out: Tensor
    norms: Tensor
    unit: float = 1.0

    def squares(self, known: list[float]) -> tuple[list[float], list[float], list[float]]:
        """‖W‖², ‖ΔW‖² and ‖rounding‖² of each; `known` are ‖ΔW‖² that the norms leave out."""
        weight, rounding, *rest = self.norms.double().square().tolist()
        delta = [found * self.unit**2 for found in rest[0]] if rest else known
        return weight, delta, rounding


def coming(
    made: Merged, shape: Sequence[int], known: list[float], settle: Callable[..., R]
) -> list[Later[R]]:
    """What `settle` makes of each of a stack, when that has come to the host.

    It gets the number, W' of this shape, ‖W‖², ‖ΔW‖² and ‖rounding‖²; `known` as in `squares`.
    """
    host = made._replace(out=back(made.out), norms=back(made.norms))
    each = host.out.reshape(len(made.out), *shape)
    squares = cache(lambda: host.squares(known))

    def of(n: int) -> Callable[[], R]:
        return lambda: settle(n, each[n], *(part[n] for part in squares()))

    return [Later(of(n), each[n].nbytes) for n in range(len(made.out))]


def together(
    found: Sequence[R | Later[R] | None], held: int
) -> list[R | None] | Later[list[R | None]]:
    """Results of several outputs, `held` bytes: all come later if one does."""
    coming = [one.nbytes for one in found if isinstance(one, Later)]
    if not coming:
        return [one for one in found if not isinstance(one, Later)]
    return Later(lambda: list(map(settled, found)), sum(coming) + held)


def widened_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of modules in float32 or wider, in one launch; flags as they are."""
    from adaptkit.linalg.precision import upcast_all

    narrow = {key: t for key, t in tensors.items() if t.is_floating_point() and t.itemsize < 4}
    return {**tensors, **dict(zip(narrow, upcast_all(list(narrow.values())), strict=True))}


def merged(
    stored: Tensor,
    parts: Sequence[tuple[Part, float]],
    dtype: torch.dtype,
    *,
    known: bool,
    contest: Contest | None = None,
) -> Merged:
    """W + Σ strength·ΔW of W (b, m, n), rounded once to `dtype`, and its norms.

    With `known`, the caller has ‖ΔW‖ of the only part. With a `contest`, a fused kernel is used
    where it is faster.
    """
    if [(part.start, part.stop) for part, _ in parts] != [(0, stored.shape[-2])]:
        return _several(stored, parts, dtype)
    part, strength = parts[0]
    kron = part.weights.kron_factors()
    pair = part.weights.factors() if kron is None and part.weights.low_rank else kron

    def plain() -> Merged:
        if known and kron is not None:
            return _kron(stored, kron, strength, dtype)
        if known and pair is not None:
            return _low_rank(stored, pair, strength, dtype)
        return _alone(stored, part.weights, strength, dtype)

    if contest is None or pair is None:
        return plain()
    from adaptkit.linalg.fused import fits, fused

    if not fits(stored, dtype, pair):
        return plain()
    kind = (kron is None, stored.dtype, dtype, stored.shape[1:])

    def at_once() -> Merged:
        return Merged(*fused(stored, pair, strength, dtype, kron=kron is not None))

    return contest.result(kind, str(stored.device), plain, at_once)


def _kron(
    stored: Tensor, pair: tuple[Tensor, Tensor], strength: float, dtype: torch.dtype
) -> Merged:
    """One pass over W writes W', another measures the rounding."""
    import torch

    from adaptkit.linalg.kron.blocks import kron_added
    from adaptkit.linalg.precision import compute_dtype

    wide = compute_dtype(stored, *pair)
    norms = _norms(stored, wide, 2)
    out = kron_added(stored, *pair, strength, torch.empty_like(stored, dtype=dtype))
    if dtype == wide:
        norms[1].zero_()
    else:
        exact = kron_added(stored, *pair, strength, torch.empty_like(stored, dtype=wide))
        _norm(exact.sub_(out), norms[1])
    return Merged(out, norms)


def _low_rank(
    stored: Tensor, pair: tuple[Tensor, Tensor], strength: float, dtype: torch.dtype
) -> Merged:
    """The product is added as it is computed: its ΔW is never formed."""
    import torch

    from adaptkit.linalg.precision import compute_dtype

    wide = compute_dtype(stored, *pair)
    both = torch.empty((2, *stored.shape), dtype=wide, device=stored.device)
    before, exact = both
    before.copy_(stored)
    left, right = (factor.to(wide) for factor in pair)
    torch.baddbmm(before, left, right, alpha=strength, out=exact)
    norms = torch.empty((2, len(stored)), dtype=wide, device=stored.device)
    if dtype == wide:
        _norm(before, norms[0])
        norms[1].zero_()
        return Merged(exact, norms)
    out = exact.to(dtype)
    exact.sub_(out)
    _norm(both, norms)
    return Merged(out, norms)


def _alone(stored: Tensor, weights: Weights, strength: float, dtype: torch.dtype) -> Merged:
    """One ΔW over all rows, formed in the buffer of what is measured."""
    import torch

    from adaptkit.linalg.precision import compute_dtype

    wide = compute_dtype(stored)
    both = torch.empty((2, *stored.shape), dtype=wide, device=stored.device)
    exact, delta = both
    pair = weights.factors() if weights.low_rank else None
    if pair is not None and compute_dtype(*pair) == wide:
        torch.matmul(*pair, out=delta)
    else:
        delta.copy_(weights.delta())
    torch.add(stored, delta, alpha=strength, out=exact)
    norms = _norms(stored, wide, 3)
    if dtype == wide:
        norms[1].zero_()
        _norm(delta, norms[2])
        out = exact
    else:
        out = exact.to(dtype)
        exact.sub_(out)
        _norm(both, norms[1:])
    return Merged(out, norms, strength)


def _several(stored: Tensor, parts: Sequence[tuple[Part, float]], dtype: torch.dtype) -> Merged:
    """Several ΔW, or one of some rows, added to W in the compute dtype."""
    from adaptkit.linalg.precision import compute_dtype

    wide = compute_dtype(stored)
    exact = stored.to(wide, copy=True)
    for part, strength in parts:
        part.add(exact, strength)
    norms = _norms(stored, wide, 3)
    _norm(exact - stored, norms[2])
    out = exact.to(dtype)
    if dtype == wide:
        norms[1].zero_()
    else:
        _norm(exact.sub_(out), norms[1])
    return Merged(out, norms)


def _norms(stored: Tensor, wide: torch.dtype, count: int) -> Tensor:
    """A buffer of norms (count, b), the first of them ‖W‖."""
    import torch

    found = torch.empty((count, len(stored)), dtype=wide, device=stored.device)
    _norm(stored, found[0])
    return found


def _norm(x: Tensor, out: Tensor) -> None:
    """‖x‖ of each of a stack (..., m, n), in one launch."""
    import torch

    torch.linalg.vector_norm(x, dim=(-2, -1), dtype=out.dtype, out=out)
