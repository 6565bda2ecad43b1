"""Scales in tiles of 128 rows and 4 columns (NVIDIA cuBLAS, "1D block scaling factors layout").

In a tile, scale (r, c) is at 16 (r mod 32) + 4 ⌊r / 32⌋ + c; tiles follow each other by rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["padded", "straight", "tiled"]


def padded(rows: int, columns: int) -> int:
    """How many scales the tiles hold."""
    return -(-rows // 128) * 128 * -(-columns // 4) * 4


def straight(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) out of their tiles."""
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiles = stored.reshape(tall, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall * 128, wide * 4)[:rows, :columns]


def tiled(scales: Tensor, stored: Tensor) -> Tensor:
    """Scales (rows, columns) in tiles, with the shape of `stored`, zeros around them."""
    rows, columns = scales.shape
    tall, wide = -(-rows // 128), -(-columns // 4)
    whole = scales.new_zeros(tall * 128, wide * 4)
    whole[:rows, :columns] = scales
    tiles = whole.reshape(tall, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(stored.shape).contiguous()
