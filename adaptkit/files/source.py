"""Read tensors lazily from safetensors, shards, folders or pickles.

Opening reads headers only and imports no torch. Data is read by positioned reads into each tensor's
own memory, from any thread. Memory maps are avoided: their pages count as resident memory.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from adaptkit.errors import CorruptFile, NoSuchName, ShapeMismatch, UnreadableFile
from adaptkit.files.header import GGML, TensorInfo, itemsize, nbytes, read_header
from adaptkit.files.reader import Reader, Stamp, stamp
from adaptkit.files.tensors import (
    bytes_of,
    decode_scalar,
    empty_bytes,
    reading_into,
    row_range,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import torch

    from adaptkit.files.header import Header
    from adaptkit.files.packing import Packed
    from adaptkit.files.pickled.catalogue import Catalogue

__all__ = ["TensorSource", "join", "open_file"]

Shape = tuple[int, ...]
# bytes read with a number: about a thousand others, where a file holds them side by side
_BLOCK = 4096


class TensorSource(ABC):
    """Lazily read tensors, from any thread. A context manager.

    `close` frees the file handles. Call it when no read is pending; a later read opens them again.
    """

    path: Path  # the file or folder that was opened
    infos: Mapping[str, TensorInfo]  # in file order
    metadata: Mapping[str, str]
    files: tuple[Path, ...]  # the files that hold the data
    size: int  # bytes of all files
    ignored: tuple[str, ...] = ()  # entries of a pickle other than tensors
    layout: str = ""  # whose arrangement the file is in, if it is not read as it is stored
    form = "safetensors"  # of the files that hold the same: safetensors or gguf

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor to the CPU, contiguous, in its own memory or where `reading_into` says.

        `rows` is a slice (step 1) of the leading dimension; only its bytes are read.
        """

    @abstractmethod
    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        """Read the tensor that `read` gives to memory of the CPU, `out` (its bytes,), uint8.

        The bytes of a file go there without a copy; strided and compressed tensors are decoded.
        """

    @abstractmethod
    def scalar(self, name: str) -> float:
        """Read a one-element tensor without torch; `ShapeMismatch` if it has more elements."""

    @abstractmethod
    def span(self, name: str) -> tuple[Path, int, int] | None:
        """File, start and stop of the raw bytes; None if not contiguous.

        That is, None for strided or compressed tensors.
        """

    @abstractmethod
    def raw(self, name: str) -> memoryview:
        """Read the tensor's bytes in row-major order."""

    @property
    def stored(self) -> TensorSource:
        """The tensors as the files hold them, without unpacking."""
        return self

    def packed(self, name: str) -> Packed | None:  # noqa: ARG002 has none
        """How a weight is packed that is read as other numbers than those stored."""
        return None

    def parts(self, packed: Packed) -> dict[str, torch.Tensor]:
        """The stored tensors of a packed weight."""
        return {part: self.stored.read(key) for part, key in packed.parts.items()}

    def announce(self, name: str) -> None:  # noqa: B027 optional
        """Prefetch a tensor that will be read soon."""

    @abstractmethod
    def order(self, name: str) -> tuple[int, int]:
        """(file index, offset); reading in this order reads every file forwards."""

    def check_unchanged(self) -> None:  # noqa: B027 optional
        """Raise `CorruptFile` if a file is another than when its header was read."""

    @abstractmethod
    def close(self) -> None:
        """Free the file handles."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = type(self).__name__.strip("_")
        return f"<{name} {str(self.path)!r}: {len(self.infos)} tensors, {self.size} bytes>"


class _FileSource(TensorSource):
    """One file with tensors at byte spans."""

    def __init__(self, path: Path, found: Header | Catalogue, at: Stamp) -> None:
        self.path = path
        self.files = (path,)
        self.infos = found.infos
        self.metadata = {}
        self.size = found.size
        self._reader = Reader(path, found.size, at)

    def info(self, name: str) -> TensorInfo:
        try:
            return self.infos[name]
        except KeyError:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path) from None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        info, (_, shape) = self._read_as(name), self._cut(name, rows)
        out = empty_bytes(info, self.path, nbytes(info.dtype, shape))
        self.read_into(out, name, rows)
        return out.view(torch_dtype(info, self.path)).reshape(shape)

    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        info, (first, shape) = self._read_as(name), self._cut(name, rows)
        if len(out) != nbytes(info.dtype, shape):
            raise ShapeMismatch(
                f"{len(out)} bytes of memory for {nbytes(info.dtype, shape)}",
                file=self.path,
                tensor=name,
            )
        self._into(out, self.info(name), first, shape)

    def _read_as(self, name: str) -> TensorInfo:
        """The tensor, in the dtype that it is read as."""
        return self.info(name)

    def _cut(self, name: str, rows: slice | None) -> tuple[int, Shape]:
        """The first row, and the shape of a slice or of the whole."""
        info = self.info(name)
        first, count = row_range(info, rows)
        return first, info.shape if rows is None else (count, *info.shape[1:])

    def _into(self, out: torch.Tensor, info: TensorInfo, first: int, shape: Shape) -> None:
        """Fill `out` with a tensor of this shape from row `first` on."""
        row = nbytes(info.dtype, shape[1:]) if first else 0
        self._fill(info, bytes_of(out), first * row)

    def _fill(self, info: TensorInfo, view: memoryview, skip: int) -> None:
        """Read bytes `skip : skip + len(view)` of a tensor."""
        self._reader.into(view, info.start + skip, info.name)

    def scalar(self, name: str) -> float:
        info = self.info(name)
        if info.numel != 1:
            raise ShapeMismatch(
                f"expected a single number, got shape {list(info.shape)}",
                file=self.path,
                tensor=name,
            )
        return decode_scalar(self._small(info), info, self.path)

    def _small(self, info: TensorInfo) -> bytes:
        """The bytes of a tensor of one number."""
        raw = bytearray(info.nbytes)
        self._fill(info, memoryview(raw), 0)
        return bytes(raw)

    def span(self, name: str) -> tuple[Path, int, int] | None:
        info = self.info(name)
        return self.path, info.start, info.stop

    def raw(self, name: str) -> memoryview:
        info = self.info(name)
        if self.span(name) is None:
            import torch

            return bytes_of(self.read(name).reshape(-1).view(torch.uint8))
        view = memoryview(bytearray(info.nbytes))
        self._fill(info, view, 0)
        return view

    def announce(self, name: str) -> None:
        if (span := self.span(name)) is not None:
            self._reader.ahead(span[1], span[2] - span[1])

    def order(self, name: str) -> tuple[int, int]:
        return 0, self.info(name).start

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._reader.close()


class _SafetensorsSource(_FileSource):
    """One `.safetensors` file."""

    def __init__(self, path: Path, header: Header, at: Stamp) -> None:
        super().__init__(path, header, at)
        self.metadata = header.metadata
        self._block = (0, b"")

    def _small(self, info: TensorInfo) -> bytes:
        """The bytes of a number; those around it are kept, as files hold theirs side by side."""
        first, block = self._block
        if not first <= info.start <= info.stop <= first + len(block):
            first = info.start
            found = bytearray(max(info.nbytes, min(_BLOCK, self.size - first)))
            self._reader.into(memoryview(found), first, info.name)
            block = bytes(found)
            self._block = (first, block)
        return block[info.start - first : info.stop - first]


class _GgufSource(_FileSource):
    """One `.gguf` file; block-quantised tensors are read as float32."""

    form = "gguf"

    def __init__(self, path: Path, header: Header, at: Stamp) -> None:
        super().__init__(path, header, at)
        self.metadata = header.metadata
        self._blocks = _FileSource(path, header, at)
        self._blocks.metadata, self._blocks.form = header.metadata, self.form
        self._blocks._reader = self._reader

    @property
    def stored(self) -> TensorSource:
        return self._blocks

    def span(self, name: str) -> tuple[Path, int, int] | None:
        return None if self.info(name).dtype in GGML else super().span(name)

    def _read_as(self, name: str) -> TensorInfo:
        info = self.info(name)
        return info._replace(dtype="F32") if info.dtype in GGML else info

    def _into(self, out: torch.Tensor, info: TensorInfo, first: int, shape: Shape) -> None:
        if info.dtype not in GGML:
            return super()._into(out, info, first, shape)
        import torch

        from adaptkit.files.gguf.blocks import dequantised, length

        row = math.prod(info.shape[1:])
        whole = row % length(info.dtype) > 0 and shape != info.shape  # blocks span rows
        start = 0 if whole else first * nbytes(info.dtype, info.shape[1:])
        raw = self._bytes(info, nbytes(info.dtype, info.shape if whole else shape), start)
        skip = first * row if whole else 0
        found = dequantised(raw, info.dtype).reshape(-1)[skip : skip + math.prod(shape)]
        out.view(torch.float32).copy_(found)
        return None

    def _bytes(self, info: TensorInfo, size: int, skip: int = 0) -> torch.Tensor:
        import torch

        found = torch.empty(size, dtype=torch.uint8)
        self._fill(info, bytes_of(found), skip)
        return found

    def packed(self, name: str) -> Packed | None:
        info = self.info(name)
        if info.dtype not in GGML:
            return None
        from adaptkit.files.gguf.blocks import packed

        return packed(info)

    def parts(self, packed: Packed) -> dict[str, torch.Tensor]:
        infos = {part: self.info(key) for part, key in packed.parts.items()}
        return {part: self._bytes(info, info.nbytes) for part, info in infos.items()}


class _PickleSource(_FileSource):
    """One torch pickle, with strided views and compressed entries."""

    def __init__(self, path: Path, catalogue: Catalogue, at: Stamp) -> None:
        super().__init__(path, catalogue, at)
        self.ignored = catalogue.ignored
        self._strides = catalogue.strides
        self._packed = catalogue.packed

    def _into(self, out: torch.Tensor, info: TensorInfo, first: int, shape: Shape) -> None:
        if info.name not in self._strides:
            return super()._into(out, info, first, shape)
        stride, unit = self._strides[info.name], itemsize(info.dtype)
        extent = (
            0
            if 0 in shape
            else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        )
        # where it is read to is for the tensor, not for what lies between its numbers
        with reading_into(lambda _: None):
            buffer = empty_bytes(info, self.path, extent * unit)
        self._fill(info, bytes_of(buffer), first * stride[0] * unit if first else 0)
        view = buffer.view(torch_dtype(info, self.path)).as_strided(shape, stride)
        # a copy, as contiguous() would keep odd strides of dimensions of size 1
        out.view(view.dtype).view(shape).copy_(view)
        return None

    def _fill(self, info: TensorInfo, view: memoryview, skip: int) -> None:
        packed = self._packed.get(info.name)
        if packed is None:
            return super()._fill(info, view, skip)
        start = packed.start + skip
        from adaptkit.files.pickled.catalogue import packed_bytes

        data = packed_bytes(self.path, packed._replace(start=start, stop=start + len(view)))
        if len(data) != len(view):
            message = (
                f"truncated: {len(view)} bytes expected in {packed.entry!r}, {len(data)} found"
            )
            raise CorruptFile(message, file=self.path, tensor=info.name)
        view[:] = data
        return None

    def span(self, name: str) -> tuple[Path, int, int] | None:
        return None if name in self._strides or name in self._packed else super().span(name)


class _JoinedSource(TensorSource):
    """Several sources as one: shards, or components of a diffusers folder."""

    def __init__(self, path: Path, parts: Sequence[tuple[str, TensorSource]]) -> None:
        self.path = path
        self.files = tuple(file for _, part in parts for file in part.files)
        self.size = sum(part.size for _, part in parts)
        self.ignored = tuple(prefix + name for prefix, part in parts for name in part.ignored)
        self.metadata = {
            key: value for _, part in reversed(parts) for key, value in part.metadata.items()
        }
        self._parts = [part for _, part in parts]
        # the last item: index of the part's first file
        self._places: dict[str, tuple[TensorSource, str, int]] = {}
        infos: dict[str, TensorInfo] = {}
        index = 0
        for prefix, part in parts:
            for name, info in part.infos.items():
                self._place(prefix + name, part, name, index)
                infos[prefix + name] = info._replace(name=prefix + name) if prefix else info
            index += len(part.files)
        self.infos = infos

    def _place(self, full: str, part: TensorSource, name: str, index: int) -> None:
        if full in self._places:
            other = self._places[full][0].path.name
            raise CorruptFile(
                f"both {other} and {part.path.name} hold it", file=self.path, tensor=full
            )
        self._places[full] = part, name, index

    def _find(self, name: str) -> tuple[TensorSource, str, int]:
        try:
            return self._places[name]
        except KeyError:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path) from None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        part, inner, _ = self._find(name)
        return part.read(inner, rows)

    def read_into(self, out: torch.Tensor, name: str, rows: slice | None = None) -> None:
        part, inner, _ = self._find(name)
        part.read_into(out, inner, rows)

    def scalar(self, name: str) -> float:
        part, inner, _ = self._find(name)
        return part.scalar(inner)

    def span(self, name: str) -> tuple[Path, int, int] | None:
        part, inner, _ = self._find(name)
        return part.span(inner)

    def raw(self, name: str) -> memoryview:
        part, inner, _ = self._find(name)
        return part.raw(inner)

    def announce(self, name: str) -> None:
        part, inner, _ = self._find(name)
        part.announce(inner)

    def order(self, name: str) -> tuple[int, int]:
        part, inner, index = self._find(name)
        file, offset = part.order(inner)
        return index + file, offset

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        for part in self._parts:
            part.close()


def open_file(path: Path) -> TensorSource:
    """Open one file, safetensors or torch pickle by its first bytes."""
    if not path.is_file():
        raise UnreadableFile("not a regular file", file=path)
    with path.open("rb") as file:
        head = file.read(512)
        at = stamp(os.fstat(file.fileno()))
    if head.startswith(b"GGUF"):
        from adaptkit.files.gguf import catalogue

        return _GgufSource(path, catalogue(path), at)
    if head[8:9] != b"{":
        from adaptkit.files.pickled.catalogue import looks_like_pickle, read_catalogue

        if looks_like_pickle(head):
            return _PickleSource(path, read_catalogue(path), at)
    return _SafetensorsSource(path, read_header(path), at)


def join(path: Path, parts: Sequence[tuple[str, TensorSource]]) -> TensorSource:
    """Join several (prefix, source) into one; `CorruptFile` if two hold the same name."""
    return _JoinedSource(path, parts)
