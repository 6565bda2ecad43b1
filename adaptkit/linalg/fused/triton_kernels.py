"""Triton kernels: W + strength·ΔW, its rounding and its norms in one pass over W.

Imported only where Triton is; `fused` calls them. Sums of a tile are in float32, those of all tiles
in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["TILE", "kron_kernel", "product_kernel"]

TILE = 64  # rows and columns of W that one program computes


@triton.jit
def _finish(
    w: tl.tensor,
    delta: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    place: tl.tensor,
    tiles: tl.tensor,
) -> None:
    """Round W + ΔW once, and add up W², the square of what rounding lost, and ΔW²."""
    exact = w + delta
    near = exact
    if out.dtype.element_ty == tl.bfloat16:
        # to the nearest, ties to even: Triton's interpreter would cut the bits off
        bits = exact.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    rounded = near.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    rest = tl.where(inside, exact - rounded.to(exact.dtype), 0.0)
    tl.store(sums + place, tl.sum(w * w))
    tl.store(sums + tiles + place, tl.sum(rest * rest))
    tl.store(sums + 2 * tiles + place, tl.sum(delta * delta))


@triton.jit
def kron_kernel(
    w_ptr: tl.tensor,
    one_ptr: tl.tensor,
    two_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    strength: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    tiles: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """ΔW = w1 ⊗ w2 of a tile: w1 (B, m/c, b), w2 (B, c, d), both float32."""
    member, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, columns = i * tile + tl.arange(0, tile)[:, None], j * tile + tl.arange(0, tile)[None, :]
    inside = (rows < m) & (columns < n)
    at = member * m * n + rows * n + columns
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    one = tl.load(
        one_ptr + member * (m // c) * b + (rows // c) * b + columns // d, mask=inside, other=0.0
    )
    two = tl.load(two_ptr + member * c * d + (rows % c) * d + columns % d, mask=inside, other=0.0)
    place = (member * tl.num_programs(1) + i) * tl.num_programs(2) + j
    _finish(w, strength * (one * two), out_ptr, sums_ptr, at, inside, place, tiles)


@triton.jit
def product_kernel(
    w_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    strength: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    r: tl.tensor,
    tiles: tl.tensor,
    tile: tl.constexpr,
    step: tl.constexpr,
) -> None:
    """ΔW = left · right of a tile: left (B, m, r), right (B, r, n), both float32."""
    member, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, columns = i * tile + tl.arange(0, tile)[:, None], j * tile + tl.arange(0, tile)[None, :]
    inside = (rows < m) & (columns < n)
    at = member * m * n + rows * n + columns
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.zeros((tile, tile), tl.float32)
    for start in range(0, r, step):
        across, down = start + tl.arange(0, step)[None, :], start + tl.arange(0, step)[:, None]
        left = tl.load(
            left_ptr + member * m * r + rows * r + across, mask=(rows < m) & (across < r), other=0.0
        )
        right = tl.load(
            right_ptr + member * r * n + down * n + columns,
            mask=(down < r) & (columns < n),
            other=0.0,
        )
        delta = tl.dot(left, right, delta, input_precision="ieee")
    place = (member * tl.num_programs(1) + i) * tl.num_programs(2) + j
    _finish(w, strength * delta, out_ptr, sums_ptr, at, inside, place, tiles)
