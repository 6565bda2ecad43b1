"""Checkpoints whose weights are packed: each is read as the numbers that it stands for.

nf4, fp4 and int8 of bitsandbytes; nvfp4, mxfp8 and int8 of ComfyUI, rotated too. The formulas are
those of their authors, and none of their packages is needed. A packed weight has a name for its
dtype (`NF4`), the shape of its layer, and comes as float32. `Packing` writes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packed import bitsandbytes, comfy
from adaptkit.files.source import TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from adaptkit.files.packing import Packed

__all__ = ["unpacked"]


def unpacked(source: TensorSource) -> TensorSource:
    """A source of the numbers that packed weights stand for; itself if there are none."""
    found = {**bitsandbytes.find(source), **comfy.find(source)}
    return _Unpacked(source, found) if found else source


class _Unpacked(TensorSource):
    """A source with its packed weights as plain ones, without the tensors that describe them."""

    def __init__(self, source: TensorSource, packed: Mapping[str, Packed]) -> None:
        self._source, self._packed = source, packed
        self.path, self.files, self.size = source.path, source.files, source.size
        self.metadata, self.ignored, self.form = source.metadata, source.ignored, source.form
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
        whole = one.decode(self.parts(one)).reshape(one.shape)
        return whole if rows is None else whole[rows].clone()

    @property
    def stored(self) -> TensorSource:
        return self._source

    def packed(self, name: str) -> Packed | None:
        return self._packed.get(name)

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
