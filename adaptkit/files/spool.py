"""Spool tensors until the specs of a file are known."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptkit.errors import CorruptFile
from adaptkit.files.publish import cannot_write
from adaptkit.files.tensors import check_finite, spec_of, tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import torch

    from adaptkit.files.header import TensorSpec
    from adaptkit.files.sink import TensorSink

__all__ = ["Spool"]


class Spool:
    """Tensors in memory up to `limit` bytes, then in a temporary file.

    Pass the output that errors name: the file is in its folder, as the system's temporary folder
    may be memory (tmpfs).
    A context manager; leaving the block frees memory and file.
    """

    def __init__(self, limit: int, output: Path) -> None:
        import tempfile

        self.limit = limit
        self.output = output
        self.folder = output.parent
        # SIM115: closed by `close`
        self._file = tempfile.SpooledTemporaryFile(dir=str(self.folder))  # noqa: SIM115
        self._places: dict[str, tuple[TensorSpec, int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a copy of a computed tensor under a new name; `NonFinite` unless all are numbers."""
        check_finite(tensor, name, self.output)
        data = tensor_bytes(tensor)
        with self._lock, self._os_errors():
            if name in self._places:
                raise RuntimeError(f"tensor {name!r} was spooled twice")
            if self._end + len(data) > self.limit:
                self._file.rollover()  # first, so that memory never exceeds the limit
            self._file.seek(self._end)
            self._file.write(data)
            self._places[name] = spec_of(name, tensor), self._end, len(data)
            self._end += len(data)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def specs(self) -> list[TensorSpec]:
        """The specs appended so far, in order."""
        return [spec for spec, _, _ in self._places.values()]

    def read(self, name: str) -> memoryview:
        """Read the bytes of a name."""
        _, start, length = self._places[name]
        buffer = bytearray(length)
        with self._lock, self._os_errors():
            self._file.seek(start)
            # under the lock: the file has one offset for all threads
            done = self._file.readinto(buffer)
        if done != length:
            raise CorruptFile("the temporary file was truncated", file=self.folder, tensor=name)
        return memoryview(buffer)

    def write_to(self, sink: TensorSink) -> None:
        """Write everything to a sink that was opened with (at least) these specs."""
        for name in self._places:
            sink.put_bytes(name, self.read(name))

    def close(self) -> None:
        """Free the memory and the file."""
        self._file.close()

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder / "(temporary file)", error, self._end) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
