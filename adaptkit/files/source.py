"""Tensors on disk behind one face: a safetensors file, shards, a diffusers folder, a torch pickle.

Opening reads headers only and imports no torch. Data is read by positioned reads straight into each tensor's own
memory, from any thread; never through a memory map, whose pages would count as resident memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import AdaptkitError, CorruptFile, NoSuchName, ShapeMismatch, UnreadableFile
from adaptkit.files.header import TORCH_NAMES, TensorInfo, itemsize, nbytes, read_header, unreadable
from adaptkit.memory import huge

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    import torch

    from adaptkit.files.header import Header
    from adaptkit.files.pickles import Catalogue

__all__ = ["COMPONENTS", "TensorSource", "open_source"]

HAS_PREADV = hasattr(os, "preadv")
HAS_FADVISE = hasattr(os, "posix_fadvise")
_CHUNK = 1 << 30  # bytes per system call; macOS and Linux refuse or cut reads of 2 GiB and more

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
)
"""The folders of a diffusers model that hold weights, in the order in which they are read."""


class _Reader:
    """Positioned reads from one file. Opened at the first read, so that a source used for its header holds no file."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()

    def into(self, view: memoryview, start: int, tensor: str) -> None:
        """Fill `view` with the bytes from `start` on; `CorruptFile` naming the tensor if the file ends before."""
        file = self._opened()
        done = 0
        while done < len(view):
            try:
                count = self._some(file, view[done : done + _CHUNK], start + done)
            except (OSError, ValueError) as error:  # ValueError: closed in another thread
                reason = error if isinstance(error, OSError) else OSError(str(error))
                raise unreadable(self.path, reason).at(tensor=tensor) from error
            if count == 0:
                message = f"truncated: {len(view)} bytes expected at {start}, {done} found"
                raise CorruptFile(
                    message, file=self.path, tensor=tensor, hint="did the file change meanwhile?"
                )
            done += count

    def _some(self, file: io.FileIO, view: memoryview, start: int) -> int:
        if HAS_PREADV:
            return os.preadv(file.fileno(), [view], start)
        with self._lock:
            file.seek(start)
            return file.readinto(view) or 0

    def ahead(self, start: int, length: int) -> None:
        """Have the system fetch these bytes from the disk, where it takes such advice."""
        if HAS_FADVISE:
            with suppress(OSError, AdaptkitError):  # whoever reads them will say what is wrong
                os.posix_fadvise(self._opened().fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> io.FileIO:
        with self._lock:
            if self._file is None:
                try:
                    file = self.path.open("rb", buffering=0)
                except OSError as error:
                    raise unreadable(self.path, error) from error
                if (now := os.fstat(file.fileno()).st_size) != self.size:
                    file.close()
                    message = f"changed since it was opened: it had {self.size} bytes, now {now}"
                    raise CorruptFile(message, file=self.path)
                self._file = file
            return self._file

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()


class TensorSource(ABC):
    """Lazily read tensors, from any thread. A context manager.

    `close` frees the file handles; call it when no read is under way (a later one opens them again).
    """

    path: Path  # what was opened: a file or a folder
    infos: Mapping[str, TensorInfo]  # in file order
    metadata: Mapping[str, str]
    files: tuple[Path, ...]  # the files that hold the data
    size: int  # bytes of all files
    ignored: tuple[str, ...] = ()  # entries of a pickle that are no tensors

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor on the CPU, contiguous, in memory of its own.

        `rows` is a slice (step 1) of the leading dimension; only its bytes are read.
        """

    @abstractmethod
    def scalar(self, name: str) -> float:
        """The value of a one-element tensor, read without torch; `ShapeMismatch` if it has more elements."""

    @abstractmethod
    def span(self, name: str) -> tuple[Path, int, int] | None:
        """File, start and stop of the tensor's raw bytes; None where they are strided or compressed."""

    @abstractmethod
    def raw(self, name: str) -> memoryview:
        """The tensor's bytes in row-major order."""

    def announce(self, name: str) -> None:  # noqa: B027 no more than advice
        """A tensor will be read soon: its bytes may come from the disk while others are worked on."""

    @abstractmethod
    def order(self, name: str) -> tuple[int, int]:
        """File index and offset: reading in this order reads every file forwards."""

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
        return f"<{type(self).__name__.strip('_')} {str(self.path)!r}: {len(self.infos)} tensors, {self.size} bytes>"


class _FileSource(TensorSource):
    """One file whose tensors are spans of bytes."""

    def __init__(self, path: Path, found: Header | Catalogue) -> None:
        self.path = path
        self.files = (path,)
        self.infos = found.infos
        self.metadata = {}
        self.size = found.size
        self._reader = _Reader(path, found.size)

    def info(self, name: str) -> TensorInfo:
        try:
            return self.infos[name]
        except KeyError:
            raise NoSuchName.among("tensor", name, self.infos).at(file=self.path) from None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        info = self.info(name)
        first, count = _row_range(info, rows)
        shape = info.shape if rows is None else (count, *info.shape[1:])
        row = nbytes(info.dtype, info.shape[1:]) if rows is not None else 0
        buffer = _buffer(info, self.path, nbytes(info.dtype, shape))
        self._fill(info, _view(buffer), first * row)
        return buffer.view(_torch_dtype(info, self.path)).reshape(shape)

    def _fill(self, info: TensorInfo, view: memoryview, skip: int) -> None:
        """Read bytes `skip : skip + len(view)` of a tensor."""
        self._reader.into(view, info.start + skip, info.name)

    def scalar(self, name: str) -> float:
        info = self.info(name)
        if info.numel != 1:
            raise ShapeMismatch(
                f"a single number expected, shape is {list(info.shape)}",
                file=self.path,
                tensor=name,
            )
        raw = bytearray(info.nbytes)
        self._fill(info, memoryview(raw), 0)
        return _decode_scalar(bytes(raw), info, self.path)

    def span(self, name: str) -> tuple[Path, int, int] | None:
        info = self.info(name)
        return self.path, info.start, info.stop

    def raw(self, name: str) -> memoryview:
        info = self.info(name)
        if self.span(name) is None:
            import torch

            return _view(self.read(name).reshape(-1).view(torch.uint8))
        view = memoryview(bytearray(info.nbytes))
        self._fill(info, view, 0)
        return view

    def announce(self, name: str) -> None:
        if (span := self.span(name)) is not None:
            self._reader.ahead(span[1], span[2] - span[1])

    def order(self, name: str) -> tuple[int, int]:
        return 0, self.info(name).start

    def close(self) -> None:
        self._reader.close()


class _SafetensorsSource(_FileSource):
    """One `.safetensors` file."""

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header)
        self.metadata = header.metadata


class _PickleSource(_FileSource):
    """One torch pickle: strided views and compressed entries besides plain spans."""

    def __init__(self, path: Path, catalogue: Catalogue) -> None:
        super().__init__(path, catalogue)
        self.ignored = catalogue.ignored
        self._strides = catalogue.strides
        self._packed = catalogue.packed

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._strides:
            return super().read(name, rows)
        info, stride = self.info(name), self._strides[name]
        first, count = _row_range(info, rows)
        shape = info.shape if rows is None else (count, *info.shape[1:])
        unit = itemsize(info.dtype)
        extent = (
            0
            if 0 in shape
            else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        )
        buffer = _buffer(info, self.path, extent * unit)
        self._fill(info, _view(buffer), first * stride[0] * unit)
        view = buffer.view(_torch_dtype(info, self.path)).as_strided(shape, stride)
        return view.new_empty(shape).copy_(
            view
        )  # contiguous() would keep odd strides of dimensions of size 1

    def _fill(self, info: TensorInfo, view: memoryview, skip: int) -> None:
        packed = self._packed.get(info.name)
        if packed is None:
            return super()._fill(info, view, skip)
        start = packed.start + skip
        from adaptkit.files.pickles import packed_bytes

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
    """Several sources read as one: shards (no prefix), or the components of a diffusers folder."""

    def __init__(self, path: Path, parts: Sequence[tuple[str, TensorSource]]) -> None:
        self.path = path
        self.files = tuple(file for _, part in parts for file in part.files)
        self.size = sum(part.size for _, part in parts)
        self.ignored = tuple(prefix + name for prefix, part in parts for name in part.ignored)
        self.metadata = {
            key: value for _, part in reversed(parts) for key, value in part.metadata.items()
        }
        self._parts = [part for _, part in parts]
        self._places: dict[
            str, tuple[TensorSource, str, int]
        ] = {}  # the last: index of the part's first file
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
                f"it stands in both {other} and {part.path.name}", file=self.path, tensor=full
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

    def close(self) -> None:
        for part in self._parts:
            part.close()


# --- bytes to values -------------------------------------------------------------------------------------------------


def _row_range(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """First row and number of rows; (0, 0) for the whole tensor."""
    if rows is None:
        return 0, 0
    if not info.shape:
        raise ShapeMismatch("a single number has no rows", tensor=info.name)
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ShapeMismatch(
            f"rows are read one after another, not with step {step}", tensor=info.name
        )
    return start, max(stop - start, 0)


def _buffer(info: TensorInfo, path: Path, size: int) -> torch.Tensor:
    """Uninitialised bytes for a tensor of a dtype that torch knows."""
    import torch

    _torch_dtype(info, path)
    block = huge(size)
    return (
        torch.empty(size, dtype=torch.uint8)
        if block is None
        else torch.frombuffer(block, dtype=torch.uint8, count=size)
    )


def _view(buffer: torch.Tensor) -> memoryview:
    array: Any = buffer.numpy()  # numpy's stubs hide the buffer protocol before Python 3.12
    return memoryview(array)


def _torch_dtype(info: TensorInfo, path: Path) -> torch.dtype:
    import torch

    dtype = getattr(torch, TORCH_NAMES.get(info.dtype, ""), None)
    if dtype is None:
        message = f"torch {torch.__version__} has no dtype for {info.dtype}"
        raise UnreadableFile(
            message, file=path, tensor=info.name, hint="such tensors can only be copied unchanged"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


_STRUCT = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip


def _decode_scalar(raw: bytes, info: TensorInfo, path: Path) -> float:
    if info.dtype in _STRUCT:
        return float(struct.unpack(_STRUCT[info.dtype], raw)[0])
    if info.dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if info.dtype == "F8_E5M2":  # the upper half of a float16
        return float(struct.unpack("<e", b"\0" + raw)[0])
    if info.dtype == "F8_E4M3":
        return _decode_e4m3(raw[0])
    raise UnreadableFile(
        f"a number of dtype {info.dtype} cannot be decoded", file=path, tensor=info.name
    )


def _decode_e4m3(byte: int) -> float:
    """One sign, four exponent (bias 7), three mantissa bits; no infinities, 0x7f is NaN (arXiv:2209.05433)."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, -9)
    return sign * math.ldexp(8 + mantissa, exponent - 10)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_source(path: str | Path) -> TensorSource:
    """Open whatever holds tensors: a file (its content decides its kind), a shard index, a folder. Reads headers only.

    A folder is a diffusers model (names get the prefix `<component>.`), one component, or a set of shards; safetensors
    go before pickles, files without a variant (`.fp16.`) before those with one.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise UnreadableFile("no such file or folder", file=path, hint=_near(path))
        return _open_index(path) if path.suffix == ".json" else _open_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # pathlib refuses a path that holds a null character
        raise UnreadableFile(str(error), file=repr(str(path))) from error


def _near(path: Path) -> str | None:
    """A hint for a path that does not exist."""
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r}"
    from difflib import get_close_matches

    near = get_close_matches(
        path.name, [item.name for item in path.parent.iterdir()], n=3, cutoff=0.6
    )
    return f"did you mean {' or '.join(near)}?" if near else None


def _open_file(path: Path) -> TensorSource:
    if not path.is_file():
        raise UnreadableFile("not a regular file", file=path)
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] != b"{":
        from adaptkit.files.pickles import looks_like_pickle, read_catalogue

        if looks_like_pickle(head):
            return _PickleSource(path, read_catalogue(path))
    return _SafetensorsSource(path, read_header(path))


class _WeightsName(NamedTuple):
    """What a file name tells: `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`."""

    stem: str
    variant: str
    pickle: bool
    shards: int  # 0: a file of its own
    is_index: bool


_PICKLE_SUFFIXES = ("bin", "ckpt", "pt", "pth")
_STEMS = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
    "adapter_model",
    "pytorch_lora_weights",
)
_VARIANTS = ("", "fp32", "bf16", "fp16")
_PATTERN = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<before>fp32|bf16|fp16|non_ema|ema|int8|fp8))?(?:-\d{5}-of-(?P<shards>\d{5}))?"
    r"(?:\.(?P<after>fp32|bf16|fp16|non_ema|ema|int8|fp8))?\.(?P<kind>safetensors|sft|bin|ckpt|pt|pth)"
    r"(?P<index>\.index(?:\.(?P<last>\w+))?\.json)?",
    re.IGNORECASE,
)


def _parse_name(name: str) -> _WeightsName | None:
    match = _PATTERN.fullmatch(name)
    if match is None or name.startswith("."):
        return None
    variant = match["before"] or match["after"] or match["last"] or ""
    is_pickle = match["kind"].lower() in _PICKLE_SUFFIXES
    return _WeightsName(
        match["stem"], variant, is_pickle, int(match["shards"] or 0), match["index"] is not None
    )


def _rank(name: _WeightsName) -> tuple[bool, bool, int, int]:
    """Which set of weights of a folder is meant: the least."""
    variant = _VARIANTS.index(name.variant) if name.variant in _VARIANTS else len(_VARIANTS)
    stem = _STEMS.index(name.stem) if name.stem in _STEMS else len(_STEMS)
    return stem == len(_STEMS), name.pickle, variant, stem


def _open_folder(path: Path) -> TensorSource:
    parts = [(name, path / name) for name in COMPONENTS if _weight_files(path / name)]
    if parts and ((path / "model_index.json").exists() or not _weight_files(path)):
        return _JoinedSource(
            path, [(f"{name}.", _open_component(folder)) for name, folder in parts]
        )
    return _open_component(path)


def _weight_files(folder: Path) -> list[tuple[_WeightsName, Path]]:
    if not folder.is_dir():
        return []
    found = ((_parse_name(item.name), item) for item in sorted(folder.iterdir()))
    return [(name, item) for name, item in found if name is not None and item.is_file()]


def _open_component(folder: Path) -> TensorSource:
    """The weights of one folder: one file, or the shards of one index."""
    found = _weight_files(folder)
    if not found:
        raise UnreadableFile("the folder holds no weights", file=folder, hint=_contents(folder))
    best = min(_rank(name) for name, _ in found)
    chosen = [(name, item) for name, item in found if _rank(name) == best]
    if len({(name.stem, name.variant) for name, _ in chosen}) > 1:
        names = ", ".join(item.name for _, item in chosen[:8])
        raise UnreadableFile(
            "the folder holds several weights", file=folder, hint=f"name one of them: {names}"
        )
    indices = [item for name, item in chosen if name.is_index]
    if indices:
        return _open_index(indices[0])
    whole = [item for name, item in chosen if not name.shards]
    if whole:
        return _open_file(whole[0])
    shards = [item for _, item in chosen]
    if len(shards) != chosen[0][0].shards:
        message = f"{len(shards)} of {chosen[0][0].shards} shards are there: {', '.join(s.name for s in shards[:8])}"
        raise UnreadableFile(message, file=folder, hint="fetch the missing ones")
    return _JoinedSource(folder, [("", _open_file(shard)) for shard in shards])


def _contents(folder: Path) -> str:
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds: {', '.join(names[:8])}{more}" if names else "it is empty"


def _open_index(path: Path) -> TensorSource:
    """The shards that an index names, checked against their own headers."""
    weight_map = _weight_map(path)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        message = f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}"
        raise UnreadableFile(message, file=path, hint="fetch them into the folder of the index")
    shards = {name: _open_file(path.parent / name) for name in names}
    for name, shard in weight_map.items():
        if name not in shards[shard].infos:
            raise CorruptFile(
                f"the index places it in {shard}, which does not hold it", file=path, tensor=name
            )
    return _JoinedSource(path, [("", shard) for shard in shards.values()])


def _weight_map(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"not valid JSON: {error}", file=path) from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        hint = "a shard index holds a table 'weight_map'"
        raise UnreadableFile("neither weights nor a shard index", file=path, hint=hint)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise CorruptFile(
                f"the index places it in {shard!r}, which is no file beside it",
                file=path,
                tensor=name,
            )
    return weight_map


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, by the rules of every system."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return (
        bool(name)
        and not parts.is_absolute()
        and ".." not in parts.parts
        and ":" not in name
        and "\0" not in name
    )
