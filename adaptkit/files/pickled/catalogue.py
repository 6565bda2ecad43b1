"""Locate the tensors of torch pickles without running their code.

A torch file is a pickle of containers plus raw storages. Each tensor in the pickle is a call
`_rebuild_tensor_v2(storage, offset, size, stride, …)`. Storages are entries of a zip archive or,
before torch 1.6, follow the pickle. The globals that `torch.load(weights_only=True)` accepts are
replaced by inert stand-ins; any other global is refused by name (`UnsafePickle`) before anything
is called. Needs no torch.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from adaptkit.errors import AdaptkitError, CorruptFile
from adaptkit.files.header import TensorInfo, check_names, itemsize, unreadable
from adaptkit.files.limits import LIMITS, lifted, within
from adaptkit.files.pickled.stand_ins import CONVERT, Storage, StoredTensor
from adaptkit.files.pickled.unpickler import unpickle

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["DAMAGED", "Catalogue", "Packed", "looks_like_pickle", "packed_bytes", "read_catalogue"]

# what zipfile raises for a damaged archive; names that are no text are ValueErrors
DAMAGED = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    OverflowError,
    zlib.error,
    struct.error,
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class Packed(NamedTuple):
    """Bytes `start:stop` of a compressed zip entry."""

    entry: str
    start: int
    stop: int


@dataclass(frozen=True)
class Catalogue:
    """The tensors of a pickle.

    `infos` are in order of offset. A tensor in `strides` (in elements) is a strided view;
    `start:stop` of its info covers every byte it touches. A tensor in `packed` is in a compressed
    zip entry; `start == stop` of its info is the offset of that entry. `ignored` names the entries
    that are not tensors.
    """

    infos: dict[str, TensorInfo]
    strides: dict[str, tuple[int, ...]]
    packed: dict[str, Packed]
    ignored: tuple[str, ...]
    size: int


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file starts like a zip, pickle or (torch 0.1) tar file."""
    return (
        head.startswith(b"PK\x03\x04")
        or (head[:1] == b"\x80" and head[1:2] <= b"\x05")
        or _is_tar(head)
    )


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def read_catalogue(path: str | Path) -> Catalogue:
    """List the tensors of a torch file. Reads the pickle, not the tensors.

    Raises `UnsafePickle` if it refers to anything but tensors and plain containers, `CorruptFile`
    if it is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(512)
            file.seek(0)
            root, blobs = _open_format(file, head, size)
        return _catalogue(root, blobs, size)
    except AdaptkitError as error:
        raise error.at(file=path) from error.__cause__
    except OSError as error:
        raise unreadable(path, error) from error
    except DAMAGED as error:
        raise CorruptFile(
            f"damaged or truncated: {error}", file=path, hint="fetch the file again"
        ) from error


def packed_bytes(path: Path, packed: Packed) -> bytes:
    """Read the bytes of a tensor in a compressed zip entry."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(packed.entry) as entry:
            entry.seek(packed.start)
            return entry.read(packed.stop - packed.start)
    except OSError as error:
        raise unreadable(path, error) from error
    except DAMAGED as error:
        raise CorruptFile(f"damaged entry {packed.entry!r}: {error}", file=path) from error


def _open_format(file: BinaryIO, head: bytes, size: int) -> tuple[object, _Blobs]:
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if _is_tar(head):
        raise CorruptFile(
            "torch's oldest format (a tar archive) is not supported",
            hint="load and save it once with a current torch",
        )
    if head[:1] == b"\x80":
        return _open_legacy(file, size)
    raise CorruptFile("neither a torch archive nor a pickle")


class _Blob(NamedTuple):
    """The raw bytes of one storage; `entry` names it if it is compressed."""

    start: int
    nbytes: int
    entry: str | None


_Blobs = dict[str, _Blob]


def _open_zip(file: BinaryIO, size: int) -> tuple[object, _Blobs]:
    """Read the zip format (torch >= 1.6).

    Entries: `<name>/data.pkl`, `<name>/data/<key>`, `<name>/byteorder`.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        catalogues = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(catalogues) != 1:
            raise CorruptFile(
                f"not a torch file: a zip archive with {len(catalogues)} entries named data.pkl"
            )
        root_name = catalogues[0].removesuffix("data.pkl")
        if root_name + "constants.pkl" in entries:
            raise CorruptFile(
                "a TorchScript archive, not a state dict", hint="save model.state_dict() instead"
            )
        _check_packed(entries[catalogues[0]], entries.values(), size)
        _check_byteorder(archive, entries.get(root_name + "byteorder"))
        root, _, _ = unpickle(_small_entry(archive, entries[catalogues[0]]))
        prefix = root_name + "data/"
        blobs = {
            name.removeprefix(prefix): _locate(file, info, size)
            for name, info in entries.items()
            if name.startswith(prefix)
        }
    return root, blobs


def _check_packed(
    catalogue: zipfile.ZipInfo, entries: Iterable[zipfile.ZipInfo], size: int
) -> None:
    """Bound what compressed entries take when unpacked: a few kilobytes may claim gigabytes."""
    packed = [info for info in entries if info.compress_type != zipfile.ZIP_STORED]
    if catalogue in packed:
        within("packed pickle", catalogue.file_size, beyond=size // 4)
        packed.remove(catalogue)
    within("packed weights", sum(info.file_size for info in packed), beyond=20 * size)


def _small_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    within("pickle size", info.file_size)
    with archive.open(info) as entry:
        return entry.read(-1 if lifted() else LIMITS["pickle size"].most)


def _check_byteorder(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> None:
    if info is not None and (order := _small_entry(archive, info)) != b"little":
        raise CorruptFile(f"byte order {order[:20]!r} is not supported, only little-endian")


def _locate(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> _Blob:
    """Locate an entry's bytes.

    The offset must be read from the local header, whose name and padding may differ in length
    from the central directory's.
    """
    if info.flag_bits & 1:
        raise CorruptFile(f"entry {info.filename!r} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED:
        return _Blob(info.header_offset, info.file_size, info.filename)
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise CorruptFile(f"damaged: no entry {info.filename!r} at byte {info.header_offset}")
    name, extra = struct.unpack("<HH", local[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > size:
        raise CorruptFile(
            f"truncated: entry {info.filename!r} ends at {start + info.file_size}, "
            f"the file has {size} bytes"
        )
    return _Blob(start, info.file_size, None)


def _open_legacy(file: BinaryIO, size: int) -> tuple[object, _Blobs]:
    """Read the format before torch 1.6.

    Five pickles (magic number, protocol, system, object, storage keys), then the storages.
    """
    head = file.read(-1 if lifted() else LIMITS["pickle size"].most)
    magic, at, _ = unpickle(head)
    if magic != _LEGACY_MAGIC:
        raise CorruptFile("a pickle, but not one that torch.save wrote", hint=CONVERT)
    protocol, at, _ = unpickle(head, at)
    system, at, _ = unpickle(head, at)
    if protocol != _LEGACY_PROTOCOL:
        shown = protocol if type(protocol) is int and abs(protocol) < 2**31 else "?"
        raise CorruptFile(f"unknown version {shown} of torch's legacy format")
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise CorruptFile("written on a big-endian machine, only little-endian is supported")
    root, at, storages = unpickle(head, at)
    keys, at, _ = unpickle(head, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CorruptFile("damaged: no list of storages after the pickle")
    return root, _legacy_blobs(file, keys, {storage.key: storage for storage in storages}, at, size)


def _legacy_blobs(
    file: BinaryIO, keys: Iterable[str], storages: Mapping[str, Storage], at: int, size: int
) -> _Blobs:
    """Locate each storage: number of elements (int64), then its bytes."""
    blobs: _Blobs = {}
    for key in keys:
        if key not in storages:
            raise CorruptFile(f"damaged: storage {key!r} has no known type")
        file.seek(at)
        numel = int.from_bytes(file.read(8), "little", signed=True)
        dtype = storages[key].dtype
        length = numel * (1 if dtype is None else itemsize(dtype))
        if numel < 0 or at + 8 + length > size:
            raise CorruptFile(
                f"truncated: storage {key!r} takes {length} bytes from {at + 8}, "
                f"the file has {size}"
            )
        # torch's legacy_save writes the element count as int64 before each storage
        blobs[key] = _Blob(at + 8, length, None)
        at += 8 + length
    return blobs


@dataclass
class _Draft:
    """A catalogue under construction."""

    infos: list[TensorInfo] = field(default_factory=list)
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    # bytes that views claim beyond their storages
    expanded: int = 0


def _catalogue(root: object, blobs: Mapping[str, _Blob], size: int) -> Catalogue:
    draft = _Draft()
    table = _state_dict(root, draft.ignored)
    _check_text([key for key in table if isinstance(key, str)])
    for key, value in table.items():
        if isinstance(key, str) and isinstance(value, StoredTensor):
            _place(draft, key, value, blobs)
        else:
            draft.ignored.append(_label(key))
    draft.infos.sort(key=lambda info: (info.start, info.stop))
    infos = {info.name: info for info in draft.infos}
    return Catalogue(infos, draft.strides, draft.packed, tuple(draft.ignored), size)


def _check_text(names: Sequence[str]) -> None:
    """Refuse names beyond the limits, or with half of a surrogate pair, which nothing can print."""
    check_names(names)
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise CorruptFile(f"damaged pickle: a name is not Unicode text: {error.reason}") from None


def _label(key: object) -> str:
    return (
        key
        if isinstance(key, str)
        else str(key)
        if isinstance(key, int)
        else f"({type(key).__name__})"
    )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(item, StoredTensor) for item in value.values()
    )


def _state_dict(root: object, ignored: list[str]) -> Mapping[object, object]:
    """Find the table of tensors.

    The object itself, its `state_dict`, or its only table of tensors.
    """
    if not isinstance(root, dict):
        what = (
            "a single tensor"
            if isinstance(root, StoredTensor)
            else f"a {type(root).__name__.strip('_').lower()}"
        )
        raise CorruptFile(f"holds {what}, not a table of named tensors")
    inside = [key for key, value in root.items() if _holds_tensors(value)]
    if "state_dict" in inside:
        inside = ["state_dict"]
    elif _holds_tensors(root):
        return root
    if len(inside) != 1:
        found = ", ".join(sorted(_label(key) for key in inside or root)[:10])
        reason = (
            f"holds several tables of tensors: {found}" if inside else "holds no table of tensors"
        )
        raise CorruptFile(reason, hint=None if inside or not found else f"it holds: {found}")
    ignored.extend(_label(key) for key in root if key != inside[0])
    table: Mapping[object, object] = root[inside[0]]
    return table


def _place(draft: _Draft, name: str, tensor: StoredTensor, blobs: Mapping[str, _Blob]) -> None:
    """Compute which bytes of the file a tensor takes."""
    blob = blobs.get(tensor.storage.key)
    if blob is None:
        raise CorruptFile(
            f"its storage {tensor.storage.key!r} is missing from the file", tensor=name
        )
    unit = itemsize(tensor.dtype)
    shift = tensor.storage.offset * (
        1 if tensor.storage.dtype is None else itemsize(tensor.storage.dtype)
    )
    start = shift + tensor.offset * unit
    stop = start + _extent(tensor.shape, tensor.stride) * unit
    if stop > blob.nbytes:
        raise CorruptFile(
            f"it ends at byte {stop} of a storage of {blob.nbytes} bytes", tensor=name
        )
    # a stride of 0 makes a few bytes claim any shape: refuse what memory could not hold
    draft.expanded += max(0, math.prod(tensor.shape) * unit - blob.nbytes)
    within("expanded views", draft.expanded, tensor=name)
    if not _is_contiguous(tensor.shape, tensor.stride):
        draft.strides[name] = tensor.stride
    if blob.entry is not None:
        draft.packed[name] = Packed(blob.entry, start, stop)
        start = stop = 0
    draft.infos.append(
        TensorInfo(name, tensor.dtype, tensor.shape, blob.start + start, blob.start + stop)
    )


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of elements from the first to the last that a view touches."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements are adjacent.

    The stride of a dimension of size 1 is arbitrary.
    """
    step = 1
    for n, given in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and given != step:
            return 0 in shape
        step *= n
    return True
