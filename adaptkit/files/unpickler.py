"""Unpickle torch files with inert stand-ins, after a check of every opcode."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, BinaryIO

from adaptkit.errors import AdaptkitError, CorruptFile, UnsafePickle
from adaptkit.files.pickle_globals import CONVERT, GLOBALS, Storage, StorageType

__all__ = ["CATALOGUE_LIMIT", "unpickle"]


CATALOGUE_LIMIT = 32 << 20  # bytes of pickle: about 100 000 tensors


_REFUSED_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"})


def _scan(data: bytes, start: int) -> int:
    """Check a pickle's opcodes without running it; returns the offset of its end.

    A hostile pickle could otherwise make the unpickler allocate without bound.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    nesting = _Nesting()
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in _REFUSED_OPCODES:
            raise UnsafePickle(
                f"uses the opcode {opcode.name}, which torch.save never writes", hint=CONVERT
            )
        # the memo is an array that grows to the largest index
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(arg or 0) <= count:
            raise CorruptFile("damaged pickle: a memo index out of range")
        # allocates its declared length before reading it
        if opcode.name == "BYTEARRAY8":
            raise CorruptFile("damaged pickle: a bytearray among the weights")
        nesting.follow(opcode, arg)
    return stream.tell()


class _Nesting:
    """Depth of nested tuples.

    A tuple that is a dictionary key is hashed by unguarded C recursion: 2 000 000 levels crash
    Python.
    """

    _NESTING_OPCODES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"})
    _LIMIT = 1000
    _MARK = -1

    def __init__(self) -> None:
        self._stack: list[int] = []  # depth of each object on the unpickler's stack
        self._memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, arg: Any) -> None:
        name = opcode.name
        if name == "MARK":
            self._stack.append(self._MARK)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memo.get(arg, 0))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[arg] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        else:
            depth = self._pop(opcode) + (name in self._NESTING_OPCODES)
            if depth > self._LIMIT:
                raise CorruptFile(f"damaged pickle: nested more than {self._LIMIT} deep")
            self._stack.extend([depth] * len(opcode.stack_after))

    def _pop(self, opcode: pickletools.OpcodeInfo) -> int:
        """Pop an opcode's operands; returns their greatest depth."""
        count, depth = len(opcode.stack_before), 0
        if pickletools.markobject in opcode.stack_before:
            count = opcode.stack_before.index(pickletools.markobject)
            while (top := self._stack.pop()) != self._MARK:
                depth = max(depth, top)
        for _ in range(count):
            depth = max(depth, self._stack.pop())
        return depth


def unpickle(data: bytes, start: int = 0) -> tuple[object, int, list[Storage]]:
    """Load one pickle: (object, offset of its end, storages)."""
    try:
        # scan first: unpickling must never see an opcode that was not checked
        end = _scan(data, start)
        unpickler = Unpickler(io.BytesIO(data[start:end]))
        return unpickler.load(), end, unpickler.storages
    except AdaptkitError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        reason = f"{type(error).__name__}: {error}"[:200]
        hint = (
            f"a pickle larger than {CATALOGUE_LIMIT} bytes?"
            if len(data) >= CATALOGUE_LIMIT
            else None
        )
        raise CorruptFile(f"damaged pickle ({reason})", hint=hint) from error


class Unpickler(pickle.Unpickler):
    """Resolves only the stand-ins; refuses every other global."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: list[Storage] = []

    def find_class(self, module: str, name: str) -> object:
        try:
            return GLOBALS[module, name]
        except KeyError:
            message = f"refers to {module}.{name}: loading it would run code"
            raise UnsafePickle(message, hint=CONVERT) from None

    def persistent_load(self, pid: object) -> Storage:
        match pid:
            case (
                "storage",
                StorageType() as kind,
                str() | int() as key,
                _,
                int() as numel,
                *rest,
            ) if numel >= 0:
                storage = Storage(str(key), kind.dtype, numel, _view_offset(rest))
                self.storages.append(storage)
                return storage
        raise CorruptFile("damaged pickle: unknown persistent id")


def _view_offset(rest: list[object]) -> int:
    """Read the view of a legacy file: (key of the part, offset, length)."""
    match rest:
        case [] | [None]:
            return 0
        case [(_, int() as offset, int())] if offset >= 0:
            return offset
    raise CorruptFile("damaged pickle: malformed view of a storage")
