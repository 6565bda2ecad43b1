"""Adapters whose tensors are named or ordered in a way of their own: each is read as plain ones.

No number is changed, so that what is read is exact. Nothing is written so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NoSuchName
from adaptkit.files.arranged import forge, nunchaku, per_head
from adaptkit.files.header import TensorInfo
from adaptkit.files.source import TensorSource
from adaptkit.files.tensors import bytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from adaptkit.files.arranged.contract import Arranged

__all__ = ["by_heads", "plain_factors"]


def plain_factors(source: TensorSource) -> TensorSource:
    """A source of plain factors under names that tables have; itself if it is one.

    Those that nunchaku packed have diffusers' names, and those of Forge's patches ComfyUI's.
    """
    if (packed := nunchaku.find(source.infos)) is not None:
        return _Rearranged(source, *packed, nunchaku.LAYOUT)
    if (named := forge.find(source.infos)) is not None:
        return _Rearranged(source, {}, named, forge.LAYOUT)
    return source


def by_heads(source: TensorSource, ends: Sequence[tuple[str, int]]) -> TensorSource:
    """A source of fused projections whose rows are in order; itself unless they are by heads.

    `ends` are the ends of such modules, each with the rows of one head. `ShapeMismatch` if a
    module's rows are not those of whole heads.
    """
    # what is rearranged already has the same names
    found = {} if source.layout else per_head.find(source.infos, ends)
    if not found:
        return source
    kept = {name: info for name, info in source.infos.items() if name not in found}
    return _Rearranged(source, found, kept, per_head.LAYOUT)


class _Rearranged(TensorSource):
    """A source in which some tensors are made of stored ones.

    `kept` are the tensors that are stored as they are read, by the names that they are read by.
    """

    def __init__(
        self,
        source: TensorSource,
        made: Mapping[str, Arranged],
        kept: Mapping[str, TensorInfo],
        layout: str,
    ) -> None:
        self._source, self._made, self.layout = source, made, layout
        self._kept = {name: info.name for name, info in kept.items()}
        self.path, self.files, self.size = source.path, source.files, source.size
        self.metadata, self.ignored = source.metadata, source.ignored
        infos = {name: info._replace(name=name) for name, info in kept.items()}
        for name, one in made.items():
            first = source.infos[next(iter(one.parts.values()))]
            infos[name] = TensorInfo(name, one.dtype, one.shape, first.start, first.stop)
        self.infos = dict(sorted(infos.items(), key=lambda item: self.order(item[0])))

    def _stored(self, name: str) -> str:
        if name not in self._kept:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path)
        return self._kept[name]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        one = self._made.get(name)
        if one is None:
            return self._source.read(self._stored(name), rows)
        stored = {part: self._source.read(key) for part, key in one.parts.items()}
        whole = one.read(stored)
        # its own memory, contiguous, as every source gives it
        return (whole if rows is None else whole[rows]).clone(memory_format=_contiguous())

    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        if name not in self._made:
            return self._source.read_into(out, self._stored(name), rows)
        found = self.read(name, rows)
        out.view(found.dtype).view(found.shape).copy_(found)
        return None

    def scalar(self, name: str) -> float:
        return self._source.scalar(self._stored(name))

    def span(self, name: str) -> tuple[Path, int, int] | None:
        return None if name in self._made else self._source.span(self._stored(name))

    def raw(self, name: str) -> memoryview:
        if name not in self._made:
            return self._source.raw(self._stored(name))
        import torch

        return bytes_of(self.read(name).reshape(-1).view(torch.uint8))

    def announce(self, name: str) -> None:
        one = self._made.get(name)
        for key in one.parts.values() if one is not None else (self._stored(name),):
            self._source.announce(key)

    def order(self, name: str) -> tuple[int, int]:
        one = self._made.get(name)
        first = next(iter(one.parts.values())) if one is not None else self._stored(name)
        return self._source.order(first)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()


def _contiguous() -> torch.memory_format:
    import torch

    return torch.contiguous_format
