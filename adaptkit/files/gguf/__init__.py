"""GGUF files: the catalogue of tensors, and a file like another with other numbers.

Names and shapes are those of the original model, as ComfyUI-GGUF and stable-diffusion.cpp store
them; `comfy.gguf.orig_shape.<name>` restores shapes with more than four dimensions. What is read
is read by the `gguf` package; see adaptkit.files.gguf.blocks for the numbers.
"""

from __future__ import annotations

import struct
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptkit.errors import CannotWrite, CorruptFile, NotRepresentable, UnreadableFile
from adaptkit.files.header import GGML, Header, TensorInfo, nbytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from adaptkit.files.header import Build, TensorSpec

__all__ = ["catalogue", "like"]

# the plain types, by their names in safetensors
PLAIN: Mapping[str, str] = MappingProxyType(
    {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}
    | {f"I{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
)
_SHAPE = "comfy.gguf.orig_shape."


def catalogue(path: Path) -> Header:
    """The tensors and the texts of a GGUF file. Raises `CorruptFile` if it cannot be understood."""
    gguf = _library(path)
    try:
        reader = gguf.GGUFReader(path)
        _check_whole(reader, path)
        infos = {t.name: _info(t, reader) for t in reader.tensors}
        texts = {
            name: str(field.contents())
            for name, field in reader.fields.items()
            if field.types and field.types[0] == gguf.GGUFValueType.STRING
        }
    except (UnreadableFile, NotRepresentable):
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptFile(f"not a readable GGUF file ({reason})", file=path) from error
    return Header(infos, texts, path.stat().st_size)


def _check_whole(reader: Any, path: Path) -> None:
    """Refuse one part of a file that was split (llama.cpp `gguf-split`)."""
    field = reader.get_field("split.count")
    if field is not None and int(field.contents()) > 1:
        raise NotRepresentable(
            f"one of {int(field.contents())} parts of a GGUF file",
            hint="join them with `llama-gguf-split --merge`",
            file=path,
        )


def _library(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UnreadableFile(
            "GGUF files are read with the gguf package, which is not installed",
            hint="pip install 'adaptkit[gguf]'",
            file=path,
        ) from None
    return gguf


def _info(tensor: Any, reader: Any) -> TensorInfo:
    kind = tensor.tensor_type.name
    dtype = PLAIN.get(kind, kind)
    if dtype not in GGML and kind not in PLAIN:
        raise NotRepresentable(f"tensors of the type {kind} cannot be read", tensor=tensor.name)
    # dimensions are stored from the innermost to the outermost
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    stored = reader.get_field(f"{_SHAPE}{tensor.name}")
    if stored is not None:
        shape = tuple(int(n) for n in stored.contents())
    start = int(tensor.data_offset)
    return TensorInfo(tensor.name, dtype, shape, start, start + int(tensor.n_bytes))


def like(path: Path) -> Build:
    """Builds the beginning of a file like this one, for tensors that may be of other types.

    All that it says is kept as it is, but for its texts: those are `metadata`. Raises `CannotWrite`
    if the file is of the other byte order.
    """

    def build(
        specs: Iterable[TensorSpec | TensorInfo], metadata: Mapping[str, str] | None
    ) -> tuple[bytes, dict[str, TensorInfo], int]:
        gguf = _library(path)
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I" or sys.byteorder != "little":
            raise CannotWrite("a GGUF file of big-endian numbers is not written", file=path)
        fields = _fields(reader, dict(metadata or {}), gguf.GGUFValueType.STRING)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        align, at = int(reader.alignment), 0
        listed, places = [], {}
        for spec in specs:
            kind = gguf.GGMLQuantizationType[spec.dtype]
            dimensions = tensors[spec.name].field.parts[3].tobytes()
            name = _text(spec.name)
            count = struct.pack("<I", len(dimensions) // 8)
            listed.append(name + count + dimensions + struct.pack("<IQ", int(kind), at))
            size = nbytes(spec.dtype, spec.shape)
            places[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, at, at + size)
            at = -(-(at + size) // align) * align
        version = int(reader.fields["GGUF.version"].contents())
        head = struct.pack("<4sIQQ", b"GGUF", version, len(listed), len(fields))
        head += b"".join(fields) + b"".join(listed)
        head += bytes(-len(head) % align)
        start = len(head)
        infos = {
            name: info._replace(start=start + info.start, stop=start + info.stop)
            for name, info in places.items()
        }
        return head, infos, start + at

    return build


def _fields(reader: Any, texts: dict[str, str], string: Any) -> list[bytes]:
    """The bytes of every entry: texts as given, all else as stored."""
    named = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    after = [field.offset for field in named[1:]] + [reader.tensors[0].field.offset]
    found = []
    for field, stop in zip(named, after, strict=True):
        stored = bytes(reader.data[field.offset : stop])
        if field.types[0] != string:
            found.append(stored)
        elif field.name in texts:
            value = texts.pop(field.name)
            same = value == str(field.contents())
            found.append(stored if same else _entry(field.name, value, int(string)))
    return [*found, *(_entry(name, value, int(string)) for name, value in texts.items())]


def _entry(name: str, value: str, kind: int) -> bytes:
    return _text(name) + struct.pack("<I", kind) + _text(value)


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
