"""merge: write the files of a merged checkpoint."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from adaptkit.errors import CannotWrite, CorruptFile
from adaptkit.files.header import GGML, nbytes
from adaptkit.files.tensors import tensor_bytes
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, dtype

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.sink import Pieces, TensorSink
    from adaptkit.files.source import TensorSource
    from adaptkit.ops.merge.layout import Layout, Move, Volume
    from adaptkit.ops.stages import Progress

__all__ = ["Output", "gathered", "opened"]


class Output:
    """All files of the output, from the first write until they get their names.

    `at` returns the current path of a file.
    """

    def __init__(
        self, layout: Layout, sinks: Mapping[str, TensorSink], at: Callable[[str], Path]
    ) -> None:
        self.layout, self.at = layout, at
        self._sinks = sinks
        self.size = sum(sink.size for sink in sinks.values())
        self._parts: dict[tuple[str, str], Pieces] = {}
        if layout.moves:
            stored = (
                (volume.path, spec.name) for volume in layout.volumes for spec in volume.specs
            )
            self._parts = {(path, name): sinks[path].parts(name) for path, name in stored}
        self._place = {
            name: (sinks[volume.path], stored)
            for volume in layout.volumes
            if volume.copied is None
            for name, stored in volume.names.items()
        }

    def tell(self, wrote: Callable[[int], None]) -> None:
        """Have the bytes counted that are written from now on; their headers are by now."""
        for sink in self._sinks.values():
            wrote(sink.header)
            sink.wrote = wrote

    def put(self, name: str, tensor: Tensor, *, copied: bool = False) -> None:
        """Write one tensor, named as in the checkpoint; `NonFinite` unless it is `copied`."""
        if self.layout.moves:
            scattered = self._scattered(name, tensor.dtype, tensor.shape)
            scattered.put(tensor, 0, copied=copied)
            return scattered.close()
        sink, stored = self._place[name]
        if sink.infos[stored].dtype in GGML:
            return sink.put_bytes(stored, tensor_bytes(tensor))
        return sink.put(stored, tensor, copied=copied)

    def pieces(self, name: str, dtype: dtype, shape: Sequence[int]) -> Pieces | Scattered:
        """Return a writer for one tensor in pieces."""
        if self.layout.moves:
            return self._scattered(name, dtype, shape)
        sink, stored = self._place[name]
        return sink.pieces(stored, dtype, shape)

    def copy(self, source: TensorSource, names: Iterable[str]) -> None:
        """Copy these tensors byte for byte, except for those in files that are copied whole."""
        if self.layout.moves:
            return self._copy_moved(source, names)
        groups: dict[TensorSink, list[tuple[str, TensorSource, str]]] = {}
        for name in names:
            if name in self._place:
                sink, stored = self._place[name]
                groups.setdefault(sink, []).append((stored, source, name))
        for sink, items in groups.items():
            sink.copy_many(items)
        return None

    def _scattered(self, name: str, dtype: dtype, shape: Sequence[int]) -> Scattered:
        moves = [(move, self._parts[move.path, move.stored]) for move in self.layout.moves[name]]
        return Scattered(moves, dtype, tuple(shape))

    def _copy_moved(self, source: TensorSource, names: Iterable[str]) -> None:
        """Copy rows as bytes from file to file; transposed or encoded tensors through memory."""
        found: dict[str, list[tuple[Pieces, Path, int, int, int]]] = {
            path: [] for path in self._sinks
        }
        for name in names:
            span, row = source.span(name), _row_bytes(source.infos[name])
            moves = self.layout.moves[name]
            if span is None or any(move.transposed for move in moves):
                self.put(name, source.read(name), copied=True)
                continue
            for m in moves:
                stretch = (
                    self._parts[m.path, m.stored],
                    span[0],
                    span[1] + m.start * row,
                    m.count * row,
                    m.at * row,
                )
                found[m.path].append(stretch)
        for path, items in found.items():
            self._sinks[path].copy_parts(items)
        source.check_unchanged()

    def restate(self, metadata: Callable[[Volume], Mapping[str, str]]) -> None:
        """Replace the metadata of every written file by values of the same length."""
        for volume in self.layout.volumes:
            if volume.copied is None:
                self._sinks[volume.path].restate(metadata(volume))

    def finish(self) -> None:
        """Check, sync and close all files."""
        for parts in self._parts.values():
            parts.close()
        for sink in self._sinks.values():
            sink.commit()


class Scattered:
    """Writer of one tensor of the base whose rows go to several places."""

    def __init__(
        self, moves: Sequence[tuple[Move, Pieces]], dtype: dtype, shape: tuple[int, ...]
    ) -> None:
        import torch

        self._moves, self._shape = moves, shape
        self._row = dtype.itemsize * math.prod(shape[1:])
        self._turned = (
            torch.empty(shape, dtype=dtype) if any(move.transposed for move, _ in moves) else None
        )

    def put(self, tensor: Tensor, first: int, *, copied: bool = False) -> None:
        """Write `tensor` as the elements from index `first` on, in row-major order."""
        from adaptkit.files.tensors import check_finite

        if not copied:
            check_finite(tensor, self._moves[0][1].name, self._moves[0][1].path)
        if self._turned is not None:
            self._turned.view(-1)[first : first + tensor.numel()] = tensor.reshape(-1)
            return
        data, at = tensor_bytes(tensor), first * tensor.dtype.itemsize
        for move, parts in self._moves:
            start = move.start * self._row
            one, two = max(at, start), min(at + len(data), start + move.count * self._row)
            if one < two:
                parts.put_bytes(data[one - at : two - at], one - start + move.at * self._row)

    def close(self) -> None:
        """Finish after all data is written."""
        if self._turned is not None:
            for _, parts in self._moves:
                parts.put(self._turned.T.contiguous(), 0, copied=True)


def gathered(
    moves: Sequence[Move], info: TensorInfo, stored: Mapping[tuple[str, str], TensorSource]
) -> Tensor:
    """Reassemble a tensor of the base from the places of its rows."""
    import torch

    if any(move.transposed for move in moves):
        (move,) = moves
        return stored[move.path, move.stored].read(move.stored).T.contiguous()
    if not info.shape:
        return stored[moves[0].path, moves[0].stored].read(moves[0].stored).reshape(())
    parts = sorted(moves, key=lambda move: move.start)
    rows = [stored[m.path, m.stored].read(m.stored, slice(m.at, m.at + m.count)) for m in parts]
    return torch.cat([part.reshape(len(part), *info.shape[1:]) for part in rows])


def _row_bytes(info: TensorInfo) -> int:
    return nbytes(info.dtype, info.shape[1:])


@contextmanager
def opened(
    layout: Layout,
    path: Path,
    metadata: Callable[[Volume], Mapping[str, str]],
    *,
    overwrite: bool,
    hidden: bool,
    progress: Progress | None = None,
) -> Iterator[Output]:
    """Open the output, which appears as `path` if the block succeeds.

    If `hidden`, a single file keeps a temporary name until the block ends, to be verified.
    """
    from adaptkit.files.gguf import like
    from adaptkit.files.leftovers import hidden as hidden_name
    from adaptkit.files.publish import publish_folder
    from adaptkit.files.sink import TensorSink

    if layout.folder:
        with publish_folder(path, layout.top, overwrite=overwrite) as made, ExitStack() as stack:
            _write_others(layout, made, progress)
            sinks = {
                volume.path: stack.enter_context(
                    TensorSink(made / volume.path, volume.specs, metadata(volume))
                )
                for volume in layout.volumes
                if volume.copied is None
            }
            yield Output(layout, sinks, lambda name: made / name)
        return
    (volume,) = layout.volumes
    build = None if layout.like is None else like(layout.like)
    target = hidden_name(path, "checked.part") if hidden else path
    try:
        with TensorSink(
            target, volume.specs, metadata(volume), overwrite=overwrite, build=build
        ) as sink:
            yield Output(layout, {"": sink}, lambda _: target)
        if hidden:
            _rename(target, path)
    finally:
        if hidden:
            target.unlink(missing_ok=True)


def _rename(made: Path, path: Path) -> None:
    try:
        made.replace(path)
    except OSError as error:
        raise CannotWrite(f"cannot be written: {error.strerror or error}", file=path) from error


def _write_others(layout: Layout, made: Path, progress: Progress | None) -> None:
    """Write indices and copy other files and unchanged weights files."""
    copies = {**layout.others, **{v.path: v.copied for v in layout.volumes if v.copied is not None}}
    folders = {(made / path).parent for path in (*copies, *layout.indices, *layout.files())}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {path: _bytes_of(source) for path, source in copies.items()}
    tally = Tally(progress, "copying", sum(sizes.values()), "bytes")
    for path, source in copies.items():
        try:
            shutil.copyfile(source, made / path)
        except FileNotFoundError as error:
            raise _gone(source) from error
        tally.add(sizes[path])
    for path, text in layout.indices.items():
        (made / path).write_text(text, encoding="utf-8", newline="\n")


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise _gone(path) from error


def _gone(path: Path) -> CorruptFile:
    return CorruptFile("the file was removed after planning", file=path)
