"""Round a stack of cut weights to what is written, and measure what that loses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.algorithms.contract import ALPHA
from adaptkit.errors import NonFinite
from adaptkit.keymap.kinds import applied
from adaptkit.meaning import as_read
from adaptkit.staging.lanes import back

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, KeptStack, Weights

__all__ = ["RoundedStack", "lost", "round_all", "round_stack", "round_tensor", "vanished"]


class RoundedStack(NamedTuple):
    """Stored tensors (B, …) by role on the host, the ‖·‖² lost, and the numbers rounded to zero.

    A member of a lower rank than the highest is padded with zeros. With `late`, the tensors are
    still coming from a device.
    """

    facts: Facts
    encoded: dict[str, Tensor]
    errors: list[float]
    gone: list[dict[str, int]]
    late: bool = False


def round_stack(kept: KeptStack, kind: type[Weights], dtype: Any) -> RoundedStack:
    """Round and measure; NonFinite for numbers beyond the dtype."""
    from adaptkit.linalg.precision import works_on_stacks

    whole = {role: tensor for role, tensor in kept.weights.encode().items() if role != ALPHA}
    if works_on_stacks(next(iter(whole.values())).device):
        return _at_once(kept, kind, dtype, whole)
    encoded = {role: round_tensor(role, tensor, dtype) for role, tensor in whole.items()}
    stored, facts, _, _ = as_read(kind, encoded, batch=1)
    errors = kept.distances(stored)
    gone: list[dict[str, int]] = [{} for _ in errors]
    for role in whole if any(vanished(whole[r], encoded[r]) for r in encoded) else ():
        for n, own in enumerate(gone):
            own[role] = vanished(whole[role][n], encoded[role][n])
    return RoundedStack(facts, encoded, errors, gone)


def _at_once(
    kept: KeptStack, kind: type[Weights], dtype: Any, whole: dict[str, Tensor]
) -> RoundedStack:
    """On an accelerator: one look at all numbers, and one copy of each role."""
    import torch

    from adaptkit.linalg.hosted import fetched
    from adaptkit.linalg.precision import overflow

    encoded = {role: tensor.to(dtype) for role, tensor in whole.items()}
    stored, facts, _, _ = as_read(kind, encoded, batch=1)
    sizes = [torch.linalg.vector_norm(t.flatten(1), float("inf"), dim=-1) for t in whole.values()]
    counts = [t.flatten(1).count_nonzero(-1) for part in (whole, encoded) for t in part.values()]
    changes = kept.changes(stored)
    *parts, largest, left = fetched(*changes, torch.stack(sizes, -1), torch.stack(counts, -1))
    if not bool((largest < overflow(dtype)).all()):
        raise NonFinite(f"{float(largest.max()):.4g} does not fit")
    before, after = left.long().chunk(2, -1)
    gone = [dict(zip(whole, own, strict=True)) for own in (before - after).tolist()]
    errors = kept.told(stored, parts)
    return RoundedStack(facts, {r: back(t) for r, t in encoded.items()}, errors, gone, late=True)


def round_tensor(role: str, tensor: Tensor, dtype: Any) -> Tensor:
    """A stored tensor in its dtype; NonFinite with a hint for numbers beyond that."""
    from adaptkit.linalg.precision import cast

    if role == ALPHA:
        return tensor.float()
    if not tensor.is_floating_point():  # a flag
        return tensor
    try:
        return cast(tensor, dtype)
    except NonFinite as error:
        error.hint = "write with --dtype bf16 or fp32"
        raise


def round_all(kind: type[Weights], whole: Mapping[str, Tensor], dtype: Any) -> dict[str, Tensor]:
    """The tensors of a module in their dtype, by role; a `wide` role stays in float32."""
    import torch

    wide = {role for role, named in kind.roles.items() if named.wide}
    return {
        role: round_tensor(role, tensor, torch.float32 if role in wide else dtype)
        for role, tensor in whole.items()
    }


def vanished(before: Tensor, after: Tensor) -> int:
    """The number of entries that rounding made zero."""
    from adaptkit.linalg.precision import upcast

    if before.dtype == after.dtype or not before.is_floating_point():
        return 0
    # torch counts no 8-bit floats
    left = int((upcast(after) if after.itemsize == 1 else after).count_nonzero())
    return 0 if left == after.numel() else int(before.count_nonzero()) - left


def lost(
    exact: Weights, stored: Weights, base: Tensor | None, norm: float | None
) -> tuple[float | None, float | None]:
    """‖ΔW‖² and the ‖·‖² that was lost, in float64. `norm` is ‖ΔW‖² if it is known.

    None if ΔW depends on a base weight that is not given.
    """
    if exact.additive and stored.additive:
        whole = exact.norm_squared() if norm is None else norm
        return whole, exact.distance_squared(stored, norm)
    if base is None:
        return None, None
    import torch

    from adaptkit.linalg.precision import row_blocks

    wide = torch.float64
    one, two = (applied(side, base.to(wide, copy=True), 1.0) for side in (exact, stored))
    whole = gone = 0.0
    for rows in row_blocks(base):
        whole += float((one[..., rows, :] - base[..., rows, :]).square().sum())
        gone += float((one[..., rows, :] - two[..., rows, :]).square().sum())
    return whole, gone
