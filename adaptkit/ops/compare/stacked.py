"""Measure equal modules together, on an accelerator: one look at all numbers of a stack.

In float64, as single modules are. What needs more than products of thin factors, one w1 ⊗ w2 a
side, or one difference of two checkpoints is measured module by module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.ops.compare.distance import Numbers

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.entries import Entry
    from adaptkit.ops.compare.matching import Match, Side

    # left (B, m, r) and right (B, r, n) in float64
    Factors = tuple[Tensor, Tensor]

__all__ = ["likeness_of", "measure_stack"]

# of the norms: a smaller distance is measured by itself, and so is what overflows
NEAR = 1e-6


def likeness_of(match: Match, base: Checkpoint | None, tuned: Checkpoint | None) -> Hashable | None:
    """What two matches must share to be measured as one stack; None for one by itself."""
    sides = match.sides
    if len(sides) > 2 or not all(map(_plain, sides)):
        return None
    entries = [entry for side in sides if (entry := side.entry)]
    krons = {entry.kind.kron for entry in entries}
    if len(krons) > 1 or (krons == {True} and len({_blocks(side) for side in sides}) > 1):
        return None
    # both halves exchanged are the same numbers in another order
    if len({entry.swapped for entry in entries}) > 1:
        return None
    change: Hashable = None
    if match.change is not None:
        if base is None or tuned is None or True in krons or any(e.swapped for e in entries):
            return None
        change = tuple(
            (c.likeness(pieces), c.slot_shape(pieces))
            for c, pieces in zip((base, tuned), match.change, strict=True)
        )
    return match.mine is None, change, tuple(map(_alike, sides))


def _plain(side: Side) -> bool:
    """Whether ΔW is a product of thin factors, or one Kronecker product, as it stands."""
    entry = side.entry
    if entry is None or side.cut is not None or side.base is not None or not entry.kind.additive:
        return False
    return entry.kind.kron or side.rank is not None


def _alike(side: Side) -> Hashable:
    assert side.entry is not None
    return side.entry.likeness(side.given.adapter.source.infos), side.given.strength


def _blocks(side: Side) -> Hashable:
    """The stored shapes: where they are equal, so are those of w1 and w2."""
    assert side.entry is not None
    infos = side.given.adapter.source.infos
    return frozenset((role, infos[key].shape) for role, key in side.entry.tensors())


def measure_stack(
    matches: Sequence[Match], tensors: Mapping[str, Tensor], names: tuple[str, str] | None
) -> list[Numbers | None]:
    """The numbers of matches of one likeness; None for those that need a look of their own.

    tensors: (B, …) of side n by `n/role`, of the checkpoints by `names`
    """
    from adaptkit.linalg.hosted import fetched

    first = matches[0]
    forms = [_factors(side, n, tensors) for n, side in enumerate(first.sides)]
    mine = forms.pop(0) if first.mine is not None else None
    if names is not None:
        parts = _against_change(mine, tensors[names[1]], tensors[names[0]])
    else:
        parts = _of_products(mine, forms[0] if forms else None)
    one, two, inner, apart = (part.tolist() for part in fetched(*parts))
    found: list[Numbers | None] = []
    for a, b, both, distance in zip(one, two, inner, apart, strict=True):
        numbers = Numbers(a, b, both, distance if names else a + b - 2.0 * both)
        near = a > 0 and b > 0 and numbers.error < NEAR * (a + b)
        found.append(numbers if numbers.finite and not near else None)
    return found


def _factors(side: Side, n: int, tensors: Mapping[str, Tensor]) -> Factors:
    entry: Entry | None = side.entry
    assert entry is not None
    wide = {role: _wide(tensors[f"{n}/{role}"]) for role, _ in entry.tensors()}
    weights, strength = entry.kind.decode(wide, entry.facts), side.given.strength
    if (kron := weights.kron_factors()) is not None:
        # rearranged, w1 ⊗ w2 is vec(w1) vec(w2)ᵀ
        left, right = kron[0].flatten(-2).unsqueeze(-1), kron[1].flatten(-2).unsqueeze(-2)
    else:
        left, right = weights.factors()
    return left if strength == 1.0 else left * strength, right


def _wide(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def _of_products(one: Factors | None, two: Factors | None) -> tuple[Tensor, ...]:
    """‖A‖², ‖B‖², ⟨A, B⟩ (B,), and a distance that is not known here; None is zero."""
    from adaptkit.linalg.products import product_inner

    given = one or two
    assert given is not None
    zero = given[0].new_zeros(len(given[0]))
    norms = [zero if side is None else product_inner(side, side) for side in (one, two)]
    both = zero if one is None or two is None else product_inner(one, two)
    return *norms, both, zero


def _against_change(one: Factors | None, tuned: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """‖A‖², ‖D‖², ⟨A, D⟩ and ‖A − D‖² (B,), for D = tuned − base."""
    import torch

    from adaptkit.linalg.products import product_inner

    change = _wide(tuned).sub_(_wide(base)).flatten(2)
    size = torch.linalg.vector_norm(change, dim=(-2, -1)).square()
    if one is None:
        zero = torch.zeros_like(size)
        return zero, size, zero, size
    inner = ((change @ one[1].mT) * one[0]).sum((-2, -1))
    apart = change.baddbmm_(*one, alpha=-1.0)
    return (
        product_inner(one, one),
        size,
        inner,
        torch.linalg.vector_norm(apart, dim=(-2, -1)).square(),
    )
