"""Unpickle torch files with inert stand-ins, after a check of every opcode."""

from __future__ import annotations

import io
import pickle
from typing import BinaryIO

from adaptkit.errors import AdaptkitError, CorruptFile, UnsafePickle
from adaptkit.files.pickled.scanner import LONGEST, scan
from adaptkit.files.pickled.stand_ins import CONVERT, GLOBALS, Storage, StorageType

__all__ = ["unpickle"]


def unpickle(data: bytes, start: int = 0) -> tuple[object, int, list[Storage]]:
    """Load one pickle: (object, offset of its end, storages)."""
    try:
        # scan first: unpickling must never see an opcode that was not checked
        end = scan(data, start)
        unpickler = Unpickler(io.BytesIO(data[start:end]))
        return unpickler.load(), end, unpickler.storages
    except AdaptkitError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptFile(f"damaged pickle ({reason})") from error


class Unpickler(pickle.Unpickler):
    """Resolves only the stand-ins; refuses every other global."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: list[Storage] = []

    def find_class(self, module: str, name: str) -> object:
        try:
            return GLOBALS[module, name]
        except KeyError:
            named = ".".join(part[:LONGEST] for part in (module, name))
            message = f"refers to {named}: loading it would run code"
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
