"""Compute dtypes, exact scaling, checked casts and accurate sums."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptkit.errors import NonFinite
from adaptkit.process import huge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "ALIGNED",
    "LEAST",
    "MOST",
    "cast",
    "compute_dtype",
    "difference",
    "each",
    "empty",
    "entry_sum",
    "holds_any",
    "members",
    "norm_squared",
    "one_by_one",
    "overflow",
    "product",
    "row_blocks",
    "scaled",
    "streamed_difference",
    "supports_float64",
    "upcast",
    "upcast_all",
    "works_on_stacks",
]

# devices without float64 and without most decompositions (pytorch#177370)
NARROW = frozenset({"mps"})
STREAM = 1 << 19  # elements of a block that is widened and subtracted as it is read
SCRATCH = 1 << 18  # elements of a scratch block that fits the cache
ALIGNED = 64  # bytes: torch aligns every tensor on a CPU to this
CHUNK = 1 << 20  # elements widened at once: no full-size copy is ever made
RUN = 1024  # elements summed in float32 before float64
# up to this size the float32 rounding of single runs shows (3e-7), and float64 costs nothing
FEW = 16 * RUN
# ‖x‖²: between these, products of four entries stay far from the ends of float32
LEAST, MOST = 1e-12, 1e12
PROMOTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not the float8 kinds
FAINT = 1e-24  # ‖x‖²: below this, squares of float32 entries may have vanished


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype, copied only if needed."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def upcast_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors in float32, in one launch."""
    found = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


def supports_float64(device: torch.device | str) -> bool:
    """Whether the device has float64 (Apple's MPS does not)."""
    return torch.device(device).type not in NARROW


def works_on_stacks(device: torch.device | str) -> bool:
    """Whether stacks are faster than single matrices: on accelerators."""
    return torch.device(device).type != "cpu"


def one_by_one(x: Tensor) -> bool:
    """Whether x (..., m, n) is a stack whose members are computed one by one, as on a CPU.

    Only then do the bits of a member not depend on the rest of the stack. BLAS uses other kernels
    for a batch than for one matrix, a reduction may be cut elsewhere, and a branch for the worst
    member would be taken for all.
    """
    return x.ndim > 2 and not works_on_stacks(x.device)


def members(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each member of stacks (..., m, n), laid out in memory as a tensor of its own.

    The stacks have equal leading dimensions. On a CPU, BLAS may sum in another order for a matrix
    at an odd address or of other strides, so such members are copied there.
    """
    return zip(*(_members(stack.reshape(-1, *stack.shape[-2:])) for stack in stacks), strict=True)


def _members(stack: Tensor) -> Iterable[Tensor]:
    """The members of (B, m, n), copied on a CPU if one is not aligned."""
    if works_on_stacks(stack.device):
        return stack.unbind()
    step = stack.stride(0) * stack.itemsize if len(stack) > 1 else 0
    whole = stack.unbind()
    if whole and step % ALIGNED == 0 and _lies_well(whole[0]):
        return whole
    return map(_alone, whole)


def _lies_well(x: Tensor) -> bool:
    """Whether x (m, n) is aligned and dense as a tensor of its own would be."""
    # the stride of a side of 1 is arbitrary
    dense = x.is_contiguous() or x.mT.is_contiguous()
    return dense and 1 not in x.shape and x.data_ptr() % ALIGNED == 0


def _alone(x: Tensor) -> Tensor:
    if 1 in x.shape:
        return x.clone(memory_format=torch.contiguous_format)
    return x if _lies_well(x) else x.clone()


def each(function: Callable[..., Any], *stacks: Tensor) -> tuple[Tensor, ...]:
    """Apply `function` to each member of stacks (..., m, n) and stack its results.

    On accelerators it is applied to whole stacks.
    """
    if not (one_by_one(stacks[0]) and stacks[0].numel()):
        found = function(*stacks)
        return found if isinstance(found, tuple) else (found,)
    made = [function(*member) for member in members(*stacks)]
    batch = stacks[0].shape[:-2]
    parts = zip(*made, strict=True) if isinstance(made[0], tuple) else (made,)
    return tuple(torch.stack(part).reshape(*batch, *part[0].shape) for part in parts)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x (..., m, k) · y (..., k, n), each of a stack by itself on a CPU."""
    if not one_by_one(x):
        return x @ y
    result = x.new_empty(*x.shape[:-1], y.shape[-1])
    places = result.reshape(-1, *result.shape[-2:])
    if result.shape[-2:].numel() * result.itemsize % ALIGNED:
        return each(torch.mm, x, y)[0]
    for place, (one, other) in zip(places, members(x, y), strict=True):
        torch.mm(one, other, out=place)
    return result


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Rows of x (..., m, n) in blocks that stay in a CPU's cache; all at once on an accelerator."""
    rows = x.shape[-2]
    step = rows if works_on_stacks(x.device) else max(1, SCRATCH // max(1, x.shape[-1]))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + step))


def entry_sum(x: Tensor) -> Tensor:
    """The sum of all entries of x (..., m, n), (...,), each of a stack by itself on a CPU."""
    return each(torch.sum, x)[0] if one_by_one(x) else x.sum((-1, -2))


def holds_any(x: Tensor) -> Tensor:
    """Whether any entry of x (..., m, n) is not zero, (...,)."""
    if works_on_stacks(x.device):
        return x.any(-1).any(-1)
    if not x.numel():
        return torch.zeros(x.shape[:-2], dtype=torch.bool)
    # `any` makes a mask, 66 MB of a FLUX.1 layer, and extremes of each row take 16 times as long
    low, high = each(torch.aminmax, x.mT if x.mT.is_contiguous() else x)
    return (low != 0) | (high != 0)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Contiguous pieces, (..., up to CHUNK), of x (..., m, n) in row-major order."""
    flat = x.flatten(-2)
    for start in range(0, flat.shape[-1], CHUNK):
        yield flat[..., start : start + CHUNK]


def norm_squared(x: Tensor) -> Tensor:
    """‖x‖_F² over the last two dimensions, (..., m, n) → (...,), in float64 (float32 on MPS).

    Runs of 1024 entries are summed in float32, the runs in float64. This is within 7e-8 of the
    float64 sum from 17,000 entries on, within 6e-9 at a million, and 15 times faster (measured).
    Shorter tensors and tails are summed in float64, and on a CPU also a whole x whose squares
    leave the range of float32. On accelerators rows are summed in float32 and their sums in
    float64: entries below 1e-19 may be lost there, and above 1e19 the result may be infinite.
    """
    x = x.mT if x.mT.is_contiguous() else x  # read memory in order, without a copy
    # a merge alone computes on a device without float64, see `Resources.choose`
    wide = torch.float64 if supports_float64(x.device) else torch.float32
    if works_on_stacks(x.device):
        rows = torch.linalg.vector_norm(x, dim=-1, dtype=compute_dtype(x))
        whole: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
        return whole.square()
    total = torch.zeros(x.shape[:-2], dtype=wide, device=x.device)
    for piece in _pieces(x):
        full = piece.shape[-1] // RUN * RUN if piece.shape[-1] > FEW else 0
        if full:
            runs = upcast(piece[..., :full]).reshape(*piece.shape[:-1], -1, RUN)
            total += torch.linalg.vector_norm(runs, dim=-1).to(wide).square().sum(-1)
        total += piece[..., full:].to(wide).square().sum(-1)
    if x.device.type == "cpu" and x.shape[-2:].numel() > FEW:
        odd = (total < FAINT) | total.isinf()
        if bool(odd.any()) and bool(x.any()):
            exact = sum(piece.to(wide).square().sum(-1) for piece in _pieces(x))
            total = torch.where(odd, exact, total)
    return total


def scaled(x: Tensor, total: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x (..., m, n) times a power of two, and the inverse of that number (...,).

    (x, None) if every ‖x‖² is between 1e-12 and 1e12, or 0: the usual case, without a copy.
    Otherwise each member of a stack has its own number, which brings its ‖x‖ near 1: then neither
    the square of a product of two entries vanishes nor does it overflow. The number is a power of
    64, so that it can be shared exactly among two factors, or three. `total` is ‖x‖², if known.
    """
    total = norm_squared(x) if total is None else total
    odd = (total > 0) & ((total < LEAST) | (total > MOST)) & total.isfinite()
    if not bool(odd.any()):
        return x, None
    exponent = 6.0 * torch.where(odd, total, 1.0).log2().div(12).round().clamp(-20, 20)
    return x * exponent.neg().exp2().to(x.dtype)[..., None, None], exponent.exp2()


def difference(x: Tensor, y: Tensor) -> Tensor:
    """x − y, (..., m, n), widened before subtracting: to float64 if either is, else float32.

    Subtracting bf16 tensors in bf16 changes one entry in nine. y is widened in blocks of rows into
    a scratch that stays in the cache. That takes a quarter of the time of a subtraction of mixed
    dtypes, and no second full-size copy. An accelerator widens in its registers.
    """
    if works_on_stacks(x.device):
        dtype = compute_dtype(x, y)
        return x.to(dtype).sub(y if y.dtype in PROMOTED else y.to(dtype))
    result = empty(x.shape, compute_dtype(x, y), x.device)
    step = max(1, SCRATCH // max(1, x.shape[-1]))
    scratch = torch.empty_like(result[..., :step, :])
    for start in range(0, x.shape[-2], step):
        rows = slice(start, start + step)
        _subtract(result[..., rows, :], x[..., rows, :], y[..., rows, :], scratch)
    return result


def _subtract(result: Tensor, x: Tensor, y: Tensor, scratch: Tensor) -> None:
    result.copy_(x).sub_(scratch[..., : result.shape[-2], :].copy_(y))


def streamed_difference(
    blocks: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """x − y (m, n) and ‖x − y‖² () of two CPU matrices that come in pairs of row blocks (…, n).

    Equals `difference` and `norm_squared` without a second pass; neither matrix is ever in memory.
    """
    result = scratch = None
    total, start = torch.zeros((), dtype=torch.float64), 0
    for x, y in blocks:
        if result is None or scratch is None:
            result = empty(shape, compute_dtype(x, y), x.device)
            scratch = torch.empty_like(result[: len(x)])
        part = result[start : start + len(x)]
        _subtract(part, x, y, scratch)
        total += norm_squared(part)
        start += len(x)
    if result is None:
        return torch.zeros(shape), total
    return result, total


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialised; in huge pages if large and on a CPU."""
    count = math.prod(shape)
    block = huge(count * dtype.itemsize) if device.type == "cpu" else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(block, dtype=dtype, count=count).reshape(shape)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest; `NonFinite` if a finite number would overflow or be clamped.

    fp16 overflows beyond 65504; torch clamps float8_e4m3 to 448.
    """
    if tensor.dtype == dtype:
        return tensor
    if tensor.numel() and _narrows(tensor.dtype, dtype):
        _refuse_overflow(upcast(tensor), dtype)
    return tensor.to(dtype)


def _narrows(source: torch.dtype, target: torch.dtype) -> bool:
    return not source.is_floating_point or torch.finfo(target).max < torch.finfo(source).max


def _refuse_overflow(wide: Tensor, dtype: torch.dtype) -> None:
    if not _within(wide, torch.finfo(dtype).max):
        # a NaN or infinity of the input hides an overflow from the extremes: check each entry
        lost = wide[torch.isfinite(wide) & (wide.abs() >= overflow(dtype))]
        if lost.numel():
            raise NonFinite(
                f"{float(lost.abs().max()):.4g} does not fit {str(dtype).removeprefix('torch.')}"
            )


def _within(x: Tensor, bound: float) -> bool:
    """Whether every entry is in [-bound, bound]; False with a NaN."""
    low, high = torch.aminmax(x)
    return -bound <= float(low) and float(high) <= bound


def overflow(dtype: torch.dtype) -> float:
    """The least magnitude that rounds beyond the largest finite number (65520 for fp16).

    Half a step beyond it. Derived from the format, as torch silently clamps to float8_e4m3fn's 448.
    """
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)
