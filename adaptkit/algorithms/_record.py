"""Dataclasses whose methods are made with the first instance.

A header is read with the classes alone: making the methods of 50 dataclasses that nobody
instantiates took a tenth of the time of `inspect`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import TypeVar, dataclass_transform

__all__ = ["record"]

T = TypeVar("T")

_pending: set[type] = set()
_complete: set[type] = set()
_making = RLock()


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """`dataclass(frozen=True, eq=False)`, applied when the first instance is made."""
    _pending.add(cls)
    cls.__new__ = staticmethod(_new)  # type: ignore[method-assign]
    return cls


# `__new__`, as Python looks for `__init__` after it
def _new(cls: type[T], *_values: object, **_named: object) -> T:
    if cls not in _complete:
        _finish(cls)
    return object.__new__(cls)


def _finish(cls: type) -> None:
    """Make a class and its bases the dataclasses that they are to be, bases first."""
    with _making:
        for base in reversed(cls.__mro__):
            if base in _pending:
                dataclass(frozen=True, eq=False)(base)
                _pending.discard(base)
        # last: until then other threads wait for the lock
        _complete.add(cls)
