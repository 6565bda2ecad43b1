"""Checkpoints whose weights are packed: each is read as the numbers that it stands for.

nf4, fp4 and int8 of bitsandbytes; nvfp4, mxfp8 and int8 of ComfyUI, rotated too. The formulas are
those of their authors, and none of their packages is needed. A packed weight has a name for its
dtype (`NF4`), the shape of its layer, and comes as float32. It is never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packed import bitsandbytes, comfy
from adaptkit.files.source import TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from adaptkit.files.packed.contract import Packed

__all__ = ["packed_weights", "scaled_integers", "unpacked"]


def packed_weights(source: TensorSource) -> dict[str, Packed]:
    """The weights that `unpacked` reads, by name."""
    return {**bitsandbytes.find(source), **comfy.find(source)}


def unpacked(source: TensorSource) -> TensorSource:
    """A source of the numbers that packed weights stand for; itself if there are none."""
    found = packed_weights(source)
    return _Unpacked(source, found) if found else source


def scaled_integers(source: TensorSource) -> frozenset[str]:
    """Integer weights of a file that are plain numbers but for a scale, and so can be written."""
    if isinstance(source, _Unpacked) or not any(i.dtype == "I8" for i in source.infos.values()):
        return frozenset()
    return frozenset(name for name, one in packed_weights(source).items() if one.scaled)


class _Unpacked(TensorSource):
    """A source with its packed weights as plain ones, without the tensors that describe them."""

    def __init__(self, source: TensorSource, packed: Mapping[str, Packed]) -> None:
        self._source, self._packed = source, packed
        self.path, self.files, self.size = source.path, source.files, source.size
        self.metadata, self.ignored = source.metadata, source.ignored
        hidden = {key for one in packed.values() for key in one.parts.values()} - packed.keys()
        self.infos = {
            name: info._replace(dtype=packed[name].dtype, shape=packed[name].shape)
            if name in packed
            else info
            for name, info in source.infos.items()
            if name not in hidden
        }

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        one = self._packed.get(name)
        if one is None:
            return self._source.read(name, rows)
        stored = {part: self._source.read(key) for part, key in one.parts.items()}
        whole = one.decode(stored).reshape(one.shape)
        return whole if rows is None else whole[rows].clone()

    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        if name not in self._packed:
            return self._source.read_into(out, name, rows)
        found = self.read(name, rows)
        out.view(found.dtype).view(found.shape).copy_(found)
        return None

    def scalar(self, name: str) -> float:
        return self._source.scalar(name)

    def span(self, name: str) -> tuple[Path, int, int] | None:
        return None if name in self._packed else self._source.span(name)

    def raw(self, name: str) -> memoryview:
        return self._source.raw(name)

    def announce(self, name: str) -> None:
        for key in self._packed[name].parts.values() if name in self._packed else (name,):
            self._source.announce(key)

    def order(self, name: str) -> tuple[int, int]:
        return self._source.order(name)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()
