"""Checkpoints whose weights are packed: each is read as the numbers that it stands for.

nf4, fp4 and int8 of bitsandbytes; nvfp4, mxfp8 and int8 of ComfyUI, rotated too; int8, int4 and
float8 of torchao; SVDQuant of nunchaku. The formulas are
those of their authors, and none of their packages is needed. A packed weight has a name for its
dtype (`NF4`), the shape of its layer, and comes as float32. `Packing` writes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packed import bitsandbytes, comfy, svdquant, torchao
from adaptkit.files.source import TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.packing import Packed

__all__ = ["unpacked"]


def unpacked(source: TensorSource) -> TensorSource:
    """A source of the numbers that packed weights stand for; itself if there are none."""
    kinds = (bitsandbytes, comfy, svdquant, torchao)
    found = {name: one for kind in kinds for name, one in kind.find(source).items()}
    return _Unpacked(source, found) if found else source


def _as_shown(info: TensorInfo, name: str, one: Packed) -> TensorInfo:
    return info._replace(name=name, dtype=one.dtype, shape=one.shape)


class _Unpacked(TensorSource):
    """A source with its packed weights as plain ones, without the tensors that describe them."""

    def __init__(self, source: TensorSource, packed: Mapping[str, Packed]) -> None:
        self._source, self._packed = source, packed
        self.path, self.files, self.size = source.path, source.files, source.size
        self.metadata, self.ignored, self.form = source.metadata, source.ignored, source.form
        # a weight may have a name that none of its tensors has, and several one tensor
        shown: dict[str, list[str]] = {}
        for name, one in packed.items():
            shown.setdefault(one.parts["weight"], []).append(name)
        hidden = {key for one in packed.values() for key in one.parts.values()}
        infos: dict[str, TensorInfo] = {}
        for key, info in source.infos.items():
            if key not in hidden:
                infos[key] = info
            for name in shown.get(key, ()):
                infos[name] = _as_shown(info, name, packed[name])
        self.infos = infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        one = self._packed.get(name)
        if one is None:
            return self._source.read(name, rows)
        whole = one.decode(self.parts(one)).reshape(one.shape)
        return whole if rows is None else whole[rows].clone()

    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        if name not in self._packed:
            return self._source.read_into(out, name, rows)
        found = self.read(name, rows)
        out.view(found.dtype).view(found.shape).copy_(found)
        return None

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
        one = self._packed.get(name)
        return self._source.order(name if one is None else one.parts["weight"])

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()
