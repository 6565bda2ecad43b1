"""A safetensors file being written: header first, then every tensor at its offset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import NoSuchName, ShapeMismatch
from adaptkit.files.header import TensorSpec, build_header
from adaptkit.files.output_file import OutputFile, Run, coalesce
from adaptkit.files.tensors import (
    check_finite,
    decode_scalar,
    dtype_name,
    spec_of,
    tensor_bytes,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from adaptkit.files.header import Build, TensorInfo
    from adaptkit.files.source import TensorSource

__all__ = ["Pieces", "TensorSink"]


class Pieces:
    """One tensor of a sink, written in pieces from any thread.

    Call `close` after the last piece.
    """

    def __init__(self, sink: TensorSink, info: TensorInfo) -> None:
        self._sink, self._info, self._left = sink, info, info.nbytes

    def put(self, tensor: torch.Tensor, first: int, *, copied: bool = False) -> None:
        """Write `tensor` from element `first` on, in row-major order.

        Its dtype is not checked. `NonFinite` unless all are numbers, or it was `copied`.
        """
        if not copied:
            check_finite(tensor, self._info.name, self._sink.path)
        self.put_bytes(tensor_bytes(tensor), first * tensor.dtype.itemsize)

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self._info.name

    @property
    def path(self) -> Path:
        """The file that it is written to."""
        return self._sink.path

    def put_bytes(self, data: memoryview, at: int) -> None:
        """Write raw bytes from byte `at` of the tensor on."""
        self._sink._write(data, self._place(at, len(data)))
        self._count(len(data))

    def _place(self, at: int, length: int) -> int:
        """The file offset of byte `at` of this tensor."""
        if at < 0 or at + length > self._info.nbytes:
            raise RuntimeError(f"{length} bytes at {at} exceed the tensor {self._info.name!r}")
        return self._info.start + at

    def _count(self, length: int) -> None:
        with self._sink._state:
            self._left -= length

    def close(self) -> None:
        """Mark the tensor as written."""
        if self._left:
            raise RuntimeError(
                f"{self._left} bytes of {self._info.name!r} were not written, or written twice"
            )
        self._sink._written.add(self._info.name)


def _safetensors(
    specs: Iterable[TensorSpec | TensorInfo], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorInfo], int]:
    header, infos = build_header(specs, metadata)
    return header, infos, max((info.stop for info in infos.values()), default=len(header))


class TensorSink(OutputFile):
    """A safetensors file being written, tensor by tensor.

    `specs` are final; tensors come in any order from any thread.

    Bytes go to a hidden file in the folder of `path`. `commit` checks, syncs and renames it;
    leaving the `with` block without `commit` removes it. The output therefore appears complete or
    not at all, and may replace one of the inputs (on Windows: close the source before `commit`).
    A symbolic link is replaced, not followed. `build` makes the beginning of another kind of file.

    Raises `WouldOverwrite`, or `CannotWrite` for a missing folder, no permission or a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Iterable[TensorSpec | TensorInfo],
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
        build: Build | None = None,
    ) -> None:
        self._build = build or _safetensors
        header, self.infos, size = self._build(specs, metadata)
        self.header = len(header)  # bytes of the header, which is written at once
        self._claimed: set[str] = set()
        self._written: set[str] = set()
        super().__init__(path, size, overwrite=overwrite)
        try:
            self._write(memoryview(header), 0)
        except BaseException:
            self.abort()
            raise

    def put(self, name: str, tensor: torch.Tensor, *, copied: bool = False) -> None:
        """Write one tensor; `ShapeMismatch` if its dtype or shape differs from the spec.

        `NonFinite` unless all are numbers, or it was `copied` from an input.
        """
        info = self._info(name)
        self._check(info, spec_of(name, tensor))
        if not copied:
            check_finite(tensor, name, self.path)
        self._claim(name)
        self._write(tensor_bytes(tensor), info.start)
        self._written.add(name)

    def pieces(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Pieces:
        """Write one tensor in pieces; `ShapeMismatch` if it differs from the spec."""
        info = self._info(name)
        self._check(info, TensorSpec(name, dtype_name(dtype), tuple(shape)))
        self._claim(name)
        return Pieces(self, info)

    def parts(self, name: str) -> Pieces:
        """Write one tensor's bytes in pieces; dtype and shape are not checked."""
        self._claim(name)
        return Pieces(self, self._info(name))

    def copy_parts(self, items: Iterable[tuple[Pieces, Path, int, int, int]]) -> None:
        """Copy spans of files: (pieces, path, start, length, first byte within the tensor)."""
        runs: list[Run] = []
        for pieces, path, start, length, at in items:
            runs.append(Run(path, start, length, pieces._place(at, length), pieces._info.name))
            pieces._count(length)
        self._copy_runs(coalesce(runs))

    def put_bytes(self, name: str, data: memoryview) -> None:
        """Write one tensor's raw bytes."""
        info = self._info(name)
        if len(data) != info.nbytes:
            raise ShapeMismatch(
                f"got {len(data)} bytes for a tensor of {info.nbytes}",
                file=self.path,
                tensor=name,
            )
        self._claim(name)
        self._write(data, info.start)
        self._written.add(name)

    def read(self, name: str) -> memoryview:
        """Read back a tensor that was written."""
        info = self._info(name)
        return self._read(info.nbytes, info.start, name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read back a tensor that was written, on the CPU."""
        import torch

        info = self._info(name)
        data = bytearray(self.read(name))
        if not data:
            return torch.empty(info.shape, dtype=torch_dtype(info, self.path))
        return torch.frombuffer(data, dtype=torch_dtype(info, self.path)).reshape(info.shape)

    def scalar(self, name: str) -> float:
        """Read back a tensor of one element."""
        return decode_scalar(bytes(self.read(name)), self._info(name), self.path)

    def restate(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by values of the same length.

        Used for hashes that are known only at the end.
        """
        header, _, _ = self._build(self.infos.values(), metadata)
        if len(header) != self.header:
            raise RuntimeError("the header would change in length")
        self._write(memoryview(header), 0)

    def copy(self, name: str, source: TensorSource, source_name: str | None = None) -> None:
        """Copy one tensor's bytes unchanged; dtype and element count must match the spec."""
        self.copy_many([(name, source, name if source_name is None else source_name)])

    def copy_many(self, items: Iterable[tuple[str, TensorSource, str]]) -> None:
        """Copy `(name, source, source name)`; adjacent tensors are copied in one piece."""
        runs: list[Run] = []
        claimed: list[str] = []
        loose: list[
            tuple[str, TensorSource, str]
        ] = []  # strided or compressed: no raw bytes to copy
        copied = list(items)
        for name, source, source_name in copied:
            info, span, given = (
                self._info(name),
                source.span(source_name),
                source.infos[source_name],
            )
            if given.numel != info.numel or given.dtype != info.dtype:
                self._check(info, given)
            if span is None:
                loose.append((name, source, source_name))
            else:
                self._claim(name)
                claimed.append(name)
                runs.append(Run(span[0], span[1], info.nbytes, info.start, name))
        # raw copies first: only strided or compressed tensors need torch
        self._copy_runs(coalesce(runs))
        # copies open their files by name: each must still be the one whose header was read
        for source in {id(source): source for _, source, _ in copied}.values():
            source.check_unchanged()
        self._written.update(claimed)
        for name, source, source_name in loose:
            found = source.read(source_name).reshape(self.infos[name].shape)
            self.put(name, found, copied=True)

    def commit(self, *, sync: bool = True) -> None:
        """Check for missing tensors, sync, and rename to the final name.

        Without `sync` a power failure in the next seconds may leave a damaged file. Use that only
        for files that are cheap to write again.
        """
        missing = [name for name in self.infos if name not in self._written]
        if missing:
            self.abort()
            raise RuntimeError(f"{len(missing)} tensors were never written, {missing[:1]}")
        self.publish(sync=sync)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.infos[name]
        except KeyError:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path) from None

    def _check(self, info: TensorInfo, given: TensorSpec | TensorInfo) -> None:
        if (given.dtype, given.shape) != (info.dtype, info.shape):
            promised, found = (
                f"{info.dtype} {list(info.shape)}",
                f"{given.dtype} {list(given.shape)}",
            )
            raise ShapeMismatch(
                f"expected {promised}, got {found}", file=self.path, tensor=info.name
            )

    def _claim(self, name: str) -> None:
        with self._state:
            if name in self._claimed:
                raise RuntimeError(f"tensor {name!r} was written twice")
            self._claimed.add(name)
