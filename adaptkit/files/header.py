"""Parse, validate and build safetensors headers. Never imports torch.

A file is eight bytes (little-endian length of the header), the header (JSON: tensor name to dtype,
shape and offsets) and the data. The tensors must cover the data exactly: no gap, no overlap, no
trailing bytes.

Files that the safetensors library rejects are rejected here too; the tests compare the two. Each
fault has its own `CorruptFile` message. Duplicate tensor names are rejected as well: the library
accepts them and silently loses one of the two tensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import CannotWrite, CorruptFile, UnreadableFile
from adaptkit.files.dtypes import BLOCKED, DTYPES, GGML, TORCH_NAMES, itemsize, nbytes
from adaptkit.files.limits import within

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

__all__ = [
    "BLOCKED",
    "DTYPES",
    "GGML",
    "TORCH_NAMES",
    "Header",
    "TensorInfo",
    "TensorSpec",
    "build_header",
    "check_names",
    "itemsize",
    "nbytes",
    "parse_header",
    "read_header",
    "unreadable",
]

if TYPE_CHECKING:
    # makes the beginning of a file: its bytes, the place of every tensor, and the size of the file
    Build = Callable[
        [Iterable["TensorSpec | TensorInfo"], Mapping[str, str] | None],
        tuple[bytes, dict[str, "TensorInfo"], int],
    ]

HEADER_LIMIT = 100_000_000  # bytes; MAX_HEADER_SIZE of the safetensors library
_SIZE_LIMIT = 2**64 - 1  # the safetensors library counts elements and bits in a u64
_PREFIX = 8
_FIELDS = ("dtype", "shape", "data_offsets")


class TensorSpec(NamedTuple):
    """A tensor to write; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorInfo(NamedTuple):
    """A tensor in a file, at byte offsets `start` to `stop` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed elements; a strided view in a pickle may span more or fewer."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header: `infos` by offset, `size` of the file in bytes."""

    infos: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def unreadable(path: object, error: OSError) -> UnreadableFile:
    """Turn an `OSError` into an `UnreadableFile` with the system's message."""
    if isinstance(error, FileNotFoundError):
        return UnreadableFile("no such file or folder", file=path)
    if isinstance(error, PermissionError):
        return UnreadableFile(
            "permission denied", file=path, hint="check the owner and mode of the file"
        )
    return UnreadableFile(f"cannot be read: {error.strerror or error}", file=path)


# --- reading ----------------------------------------------------------------------------


def read_header(path: str | Path) -> Header:
    """Read and validate the header of a `.safetensors` file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            # a first read of 512 bytes serves foreign files and small headers alike
            raw = file.read(512)
            if len(raw) >= _PREFIX:
                wanted = _PREFIX + int.from_bytes(raw[:_PREFIX], "little")
                if len(raw) < wanted <= min(size, _PREFIX + HEADER_LIMIT):
                    raw += file.read(wanted - len(raw))
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_header(raw, size, path)


def parse_header(raw: bytes, file_size: int, path: str | Path) -> Header:
    """Validate a header.

    `raw` holds at least the length prefix and the JSON; `path` only names the file in errors.
    """
    try:
        table, data_start = _json_table(raw, file_size)
        metadata = _metadata(table.pop("__metadata__", None))
        check_names(table)
        infos = sorted(
            (_info(name, entry, data_start) for name, entry in table.items()),
            key=lambda info: (info.start, info.stop),
        )
        # as in the safetensors library, whose README gives the reason: no polyglot files
        _check_cover(infos, data_start, file_size)
    except CorruptFile as error:
        raise error.at(file=path) from error.__cause__
    return Header({info.name: info for info in infos}, metadata, file_size)


def check_names(names: Collection[str]) -> None:
    """Raise `OverLimit` for too many tensors, or a name that is too long."""
    within("keys", len(names))
    longest = max(names, key=len, default="")
    within("key length", len(longest), tensor=longest[:40] + "…")


def _json_table(raw: bytes, file_size: int) -> tuple[dict[str, Any], int]:
    """The header as a dict, and the offset of the first data byte."""
    if file_size == 0:
        raise CorruptFile("the file is empty", hint="an interrupted download? fetch it again")
    if foreign := _foreign(raw):
        raise CorruptFile(foreign[0], hint=foreign[1])
    if len(raw) < _PREFIX:
        raise CorruptFile(f"truncated: {file_size} bytes are too few for a safetensors file")
    length = int.from_bytes(raw[:_PREFIX], "little")
    if length > HEADER_LIMIT:
        raise CorruptFile(
            f"not a safetensors file: its header would take {length} bytes (limit: {HEADER_LIMIT})"
        )
    if _PREFIX + length > min(file_size, len(raw)):
        raise CorruptFile(
            f"truncated: the header takes {_PREFIX + length} bytes, the file has {file_size}"
        )
    return _decode(raw[_PREFIX : _PREFIX + length]), _PREFIX + length


_SIGNATURES = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch the file: git lfs pull",
    ),
    (
        b"<",
        "a web page or XML, not weights",
        "a download that failed or needs a login? fetch it again",
    ),
    (
        b"PK\x03\x04",
        "a zip archive (perhaps a torch checkpoint), not safetensors",
        "rename it to .ckpt or .pt",
    ),
    (b"\x80\x02\x8a\x0a", "a torch pickle, not safetensors", "rename it to .ckpt or .pt"),
    (b"\x1f\x8b", "gzip data, not safetensors", "unpack it first"),
    (
        b"SQLite format 3\0",
        "an SQLite database, not safetensors; Draw Things stores its LoRAs so",
        "export it as safetensors in Draw Things, or take the file that it was imported from",
    ),
)


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Guess what a foreign file is, and what to do about it."""
    # a length prefix may equal a signature by chance: a JSON header rules that out
    if head[_PREFIX : _PREFIX + 1] == b"{":
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, what, hint in _SIGNATURES:
        if text.startswith(magic):
            return what, hint
    if len(head) >= _PREFIX and not any(head):
        return "it starts with zero bytes only", "an interrupted download? fetch it again"
    if text.startswith((b"{", b"[")):
        return "plain JSON, not safetensors", "name the weights file itself, or its *.index.json"
    return None


def _decode(raw: bytes) -> dict[str, Any]:
    """Parse JSON as strictly as the safetensors library.

    Python's parser is laxer about -0, 1e999, NaN and lone surrogates.
    """
    if not raw.startswith(b"{"):
        raise CorruptFile("the header is not a JSON object: it does not start with '{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(f"the header is not UTF-8 at byte {_PREFIX + error.start}") from error
    try:
        # parse_int costs a call per number: use it only if a -0 may occur (names may hold one too)
        integer = _integer if "-0" in text else None
        table = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            # fails on a lone surrogate
            json.dumps(table, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"the header is not valid JSON: {error}") from error
    assert isinstance(table, dict)
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        name = next(key for key, count in counts.items() if count > 1)
        raise CorruptFile(f"the header holds the key {name!r} twice")
    return table


def _integer(text: str) -> float:
    return -0.0 if text == "-0" else int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"number out of range: {text[:20]}")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _metadata(table: object) -> dict[str, str]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise CorruptFile("__metadata__ is not a table of strings")
    within("metadata", len(table))
    for key, value in table.items():
        if not isinstance(value, str):
            raise CorruptFile(f"metadata {key!r} is not a string but {json.dumps(value)[:40]}")
    return table


def _info(name: str, entry: object, data_start: int) -> TensorInfo:
    """One tensor of the header, with absolute offsets."""
    if not isinstance(entry, dict):
        raise CorruptFile("its header entry is not a table", tensor=name)
    for field in _FIELDS:
        if field not in entry:
            raise CorruptFile(f"its header entry lacks {field!r}", tensor=name)
    dtype = entry["dtype"]
    beside = len(entry) > len(_FIELDS) and any(
        isinstance(entry[key], dict | list) for key in entry.keys() - _FIELDS
    )
    if beside or isinstance(dtype, dict | list):
        # this also bounds the nesting depth
        raise CorruptFile("its header entry holds a nested value", tensor=name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptFile(
            f"unknown dtype {dtype!r}", tensor=name, hint=f"known: {', '.join(DTYPES)}"
        )
    shape = _sizes(name, "shape", entry["shape"])
    offsets = _sizes(name, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFile(f"data_offsets {list(offsets)} are not a start and a stop", tensor=name)
    _check_bytes(name, dtype, shape, offsets[1] - offsets[0])
    return TensorInfo(name, dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _sizes(name: str, field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, list):
        for n in value:
            if type(n) is not int or not 0 <= n <= _SIZE_LIMIT:
                break
        else:
            return tuple(value)
    raise CorruptFile(f"{field} is not a list of sizes", tensor=name)


def _check_bytes(name: str, dtype: str, shape: tuple[int, ...], stored: int) -> None:
    within("dimensions", len(shape), tensor=name)
    numel = 1
    for n in shape:
        numel *= n
        # check after each factor, as a u64 would overflow even if a later dimension is 0
        if numel > _SIZE_LIMIT:
            raise CorruptFile(f"shape {list(shape)} is too large", tensor=name)
    bits = numel * DTYPES[dtype]
    if bits > _SIZE_LIMIT:
        raise CorruptFile(f"shape {list(shape)} is too large", tensor=name)
    if bits % 8:
        raise CorruptFile(f"{numel} elements of {dtype} do not fill whole bytes", tensor=name)
    if bits // 8 != stored:
        message = (
            f"shape {list(shape)} of {dtype} takes {bits // 8} bytes, the header reserves {stored}"
        )
        raise CorruptFile(message, tensor=name)


def _check_cover(infos: Sequence[TensorInfo], data_start: int, file_size: int) -> None:
    """Check that the tensors cover the data without gap or overlap."""
    end = infos[-1].stop if infos else data_start
    if infos and infos[0].start != data_start:
        raise CorruptFile(
            f"{infos[0].start - data_start} bytes before it belong to no tensor",
            tensor=infos[0].name,
        )
    for before, after in pairwise(infos):
        if after.start < before.stop:
            raise CorruptFile(f"its bytes overlap those of {before.name!r}", tensor=after.name)
        if after.start > before.stop:
            message = (
                f"{after.start - before.stop} bytes between {before.name!r} and it "
                "belong to no tensor"
            )
            raise CorruptFile(message, tensor=after.name)
    if end > file_size:
        message = f"truncated: the header describes {end} bytes, the file has {file_size}"
        raise CorruptFile(message, hint="an interrupted download? fetch it again")
    if end < file_size:
        raise CorruptFile(f"{file_size - end} bytes follow the last tensor")


# --- building ---------------------------------------------------------------------------


def build_header(
    specs: Iterable[TensorSpec | TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Build the prefix and padded JSON, and place tensors in order.

    Deterministic: equal specs and metadata give equal bytes. Raises `CannotWrite` if the
    safetensors library could not read the result.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in table or spec.name == "__metadata__":
            raise CannotWrite("two tensors of one file have the same name", tensor=spec.name)
        stop = offset + _storable(spec)
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    raw = _encode(table, metadata or {})
    start = len(raw)
    infos = {
        name: TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), *(start + n for n in entry["data_offsets"])
        )
        for name, entry in table.items()
        if name != "__metadata__"
    }
    return raw, infos


def _storable(spec: TensorSpec | TensorInfo) -> int:
    """Bytes of a tensor to write; `CannotWrite` if safetensors cannot store it."""
    if spec.dtype not in DTYPES:
        raise CannotWrite(f"safetensors has no dtype {spec.dtype!r}", tensor=spec.name)
    bits = math.prod(spec.shape) * DTYPES[spec.dtype]
    if bits % 8 or not 0 <= bits <= _SIZE_LIMIT:
        raise CannotWrite(
            f"shape {list(spec.shape)} of {spec.dtype} cannot be stored", tensor=spec.name
        )
    return bits // 8


def _encode(table: dict[str, Any], metadata: Mapping[str, str]) -> bytes:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CannotWrite(f"metadata {key!r} is not a string")
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CannotWrite(
            f"a name is not valid Unicode: {error.object[error.start : error.start + 1]!r}"
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CannotWrite(f"the header would take {len(text)} bytes; readers accept {HEADER_LIMIT}")
    return struct.pack("<Q", len(text)) + text
