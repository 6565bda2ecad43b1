"""Inert stand-ins for the globals of torch's pickles.

The list follows `torch.load(weights_only=True)` (torch `_weights_only_unpickler.py`). The stand-ins
only record their arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from adaptkit.errors import CorruptFile
from adaptkit.files.header import TORCH_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CONVERT", "GLOBALS", "Storage", "StorageType", "StoredTensor"]


CONVERT = "convert it to safetensors in a sandbox, with a tool you trust"


class Storage(NamedTuple):
    """A storage that a pickle refers to."""

    key: str
    dtype: str | None  # None: untyped bytes
    numel: int  # elements of dtype, or bytes
    offset: int  # elements into the storage of that key (views in legacy files)


class StoredTensor(NamedTuple):
    """A tensor of a pickle: a strided view of a storage, in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _malformed(what: str) -> NoReturn:
    raise CorruptFile(f"damaged pickle: {what} has arguments of the wrong type")


class _Opaque:
    """Any object other than a weight. Calls and state are ignored."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Opaque:
        return self

    def __setstate__(self, state: object) -> None:
        """Ignore the state: all files share the stand-ins."""


class _Table(dict[Any, Any]):
    """OrderedDict without torch's attributes (`_metadata`)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _Call(_Opaque):
    """Stand-in for a function."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., object]) -> None:
        self.run = run

    def __call__(self, *args: object) -> Any:
        return self.run(*args)


class StorageType(_Opaque):
    """Stand-in for `torch.FloatStorage` and similar types."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str | None) -> None:
        self.dtype = dtype


class _DType(_Opaque):
    """Stand-in for `torch.float32` and similar dtypes."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def _table(*args: object) -> _Table:
    match args:
        case ():
            return _Table()
        case (list() as pairs,) if all(_is_pair(pair) for pair in pairs):
            return _Table(pairs)
    _malformed("OrderedDict")


def _is_pair(pair: object) -> bool:
    """Whether a dict may take this as a name and its value: no other name is hashed."""
    match pair:
        case (str(), _) | [str(), _]:
            return True
        case (int() as number, _) | [int() as number, _]:
            return abs(number) < 2**61  # its own hash
    return False


def _sizes(value: object) -> tuple[int, ...]:
    if (
        isinstance(value, tuple | list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    ):
        return tuple(value)
    _malformed("a size")


def _rebuild_tensor(*args: object) -> StoredTensor:
    """Read `(storage, offset, size, stride, …)`.

    Version 3 has the dtype as its seventh argument.
    """
    match args:
        case (Storage() as storage, int() as offset, size, stride, *rest) if 0 <= offset < 2**63:
            dtype = rest[2].name if len(rest) > 2 and isinstance(rest[2], _DType) else storage.dtype
            shape, strides = _sizes(size), _sizes(stride)
            if len(shape) == len(strides):
                return StoredTensor(storage, dtype or "U8", offset, shape, strides)
    _malformed("a tensor")


def _first_tensor(*args: object) -> StoredTensor:
    if args and isinstance(args[0], StoredTensor):
        return args[0]
    _malformed("a parameter")


def _rebuild_from_type(*args: object) -> StoredTensor:
    match args:
        case (_Call() as function, _Opaque(), tuple() as inner, *_) if isinstance(
            made := function(*inner), StoredTensor
        ):
            return made
    _malformed("a tensor")


def _size(*args: object) -> tuple[int, ...]:
    return _sizes(args[0] if args else ())


_TYPED = {
    "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Long": "I64", "Int": "I32",
    "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "UInt16": "U16",
    "UInt32": "U32",
    "UInt64": "U64",
}  # fmt: skip


def _globals() -> dict[tuple[str, str], object]:
    table: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): _Call(_table),
        ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): _Call(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Call(_first_tensor),
        ("torch._utils", "_rebuild_parameter_with_state"): _Call(_first_tensor),
        ("torch._tensor", "_rebuild_from_type_v2"): _Call(_rebuild_from_type),
        ("torch.nn.parameter", "Parameter"): _Call(_first_tensor),
        ("torch", "Size"): _Call(_size),
        ("torch.storage", "UntypedStorage"): StorageType(None),
        ("torch", "UntypedStorage"): StorageType(None),
        ("torch.storage", "TypedStorage"): StorageType(None),
    }
    # accepted by weights_only=True, but never part of a weight
    for module, name in (
        ("torch", "device"), ("torch", "Tensor"), ("torch.serialization", "_get_layout"),
        ("collections", "Counter"),
        ("_codecs", "encode"), ("builtins", "set"), ("builtins", "bytearray"),
        ("builtins", "complex"),
        ("__builtin__", "set"), ("__builtin__", "bytearray"), ("__builtin__", "complex"),
    ):  # fmt: skip
        table[module, name] = _Opaque()
    for name, dtype in _TYPED.items():
        table["torch", name + "Storage"] = table["torch.storage", name + "Storage"] = StorageType(
            dtype
        )
    for dtype, name in TORCH_NAMES.items():
        table["torch", name] = _DType(dtype)
    return table


GLOBALS = _globals()
