"""Follow the opcodes of a pickle without running them, in one pass.

The unpickler of Python's library is written in C, and some of what a pickle can ask of it has no
bound: it hashes a tuple of shared tuples by walking every path through them, and cannot be
interrupted meanwhile. So the opcodes are followed first, with what each leaves on the stack.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import CorruptFile, UnsafePickle
from adaptkit.files.limits import LIMITS, within
from adaptkit.files.pickled.stand_ins import CONVERT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LONGEST", "scan"]

# what an object on the stack is: anything, what must not become a name in a table, or text, to
# which the offset of its opcode is added
_ANY, _NO_KEY, _TEXT, _MARK = 0, 1, 2, -1
# integers of more digits or bytes: not their own hash, so their table may be slow
_DIGITS, _BYTES = 18, 8
# items of a tuple of texts that may be a name; only of texts are the hashes unforeseeable
_SHORT = 8
# bytes of a global's name that a report shows
LONGEST = 200


class _Opcode(NamedTuple):
    name: str
    # bytes of the argument; its length is in the first -n bytes, or it ends with the line
    width: int
    lines: int
    # objects taken (-1: all above the mark, and then one less each), and whether one is left
    taken: int
    left: bool
    result: int
    # whether the argument has `width` bytes, and what to do
    fixed: bool
    rule: Callable[[_Scan, _Opcode, int, int], None]


def _described(code: pickletools.OpcodeInfo) -> _Opcode:
    argument = code.arg
    width = lines = 0
    if argument is not None:
        lines = {"stringnl_noescape_pair": 2}.get(argument.name, int(argument.n == -1))
        counted = {
            pickletools.TAKEN_FROM_ARGUMENT1: -1,
            pickletools.TAKEN_FROM_ARGUMENT4: -4,
            pickletools.TAKEN_FROM_ARGUMENT4U: -4,
            pickletools.TAKEN_FROM_ARGUMENT8U: -8,
        }
        width = 0 if lines else counted.get(argument.n, argument.n)
    before, after = code.stack_before, code.stack_after
    marked = pickletools.markobject in before
    taken = -1 - before.index(pickletools.markobject) if marked else len(before)
    result = _NO_KEY if code.name in _HIDDEN else _ANY
    rule, fixed = _RULES.get(code.name, _Scan.plain), width >= 0 and not lines
    return _Opcode(code.name, width, lines, taken, bool(after), result, fixed, rule)


_HIDDEN = frozenset({"FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
_TEXTS = tuple(c.name for c in pickletools.opcodes if "UNICODE" in c.name or "STRING" in c.name)


def scan(data: bytes, start: int, globals: list[tuple[str, str]] | None = None) -> int:
    """Check a pickle's opcodes; returns the offset of its end.

    `globals` receives the module and the name of every global once, as far as the opcodes are
    followed.

    Raises `UnsafePickle` for opcodes that torch never writes, `OverLimit` for too many, and
    `CorruptFile` for damage and for names that would make a table slow.
    """
    found = _Scan(data, [] if globals is None else globals)
    most, size = LIMITS["pickle steps"].most, len(data)
    at = start
    try:
        while (code := _OPCODES[data[at]]).name != "STOP":
            found.at = at
            begin = at + 1
            if code.fixed:  # first: most opcodes
                at = begin + code.width
                if at > size:
                    raise IndexError
            else:
                begin, at = _argument(code, data, begin)
            found.steps += 1
            if found.steps > most and found.steps - most > (at - start) // 2:
                within("pickle steps", found.steps, beyond=(at - start) // 2)
            code.rule(found, code, begin, at)
    except KeyError as error:
        raise CorruptFile(f"damaged pickle: no opcode {error.args[0]}") from None
    except IndexError:
        raise CorruptFile("damaged pickle: it ends early, or takes what it does not hold") from None
    within("pickle steps", found.steps, beyond=(at - start) // 2)
    return at + 1


def _argument(code: _Opcode, data: bytes, at: int) -> tuple[int, int]:
    """First and last + 1 byte of an opcode's argument; IndexError if the data ends before."""
    begin = at
    if code.lines:
        for _ in range(code.lines):
            at = data.find(b"\n", at) + 1
            if not at:
                raise IndexError
        return begin, at
    if code.width < 0:
        begin = at - code.width
        at = begin + int.from_bytes(data[at:begin], "little")
    else:
        at += code.width
    if at > len(data):
        raise IndexError
    return begin, at


class _Scan:
    """What the unpickler's stack and memo would hold."""

    def __init__(self, data: bytes, globals: list[tuple[str, str]]) -> None:
        self.data, self.steps, self.globals = data, 0, globals
        self.seen: set[tuple[bytes, bytes]] = set()
        self.at = 0
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def plain(self, code: _Opcode, _begin: int, _end: int) -> None:
        """Take and leave what an opcode does."""
        stack, count = self.stack, code.taken
        if count < 0:
            self._above()
            count = -1 - count
        for _ in range(count):
            stack.pop()
        if code.left:
            stack.append(code.result)

    def text(self, _code: _Opcode, _begin: int, _end: int) -> None:
        self.stack.append(_TEXT + self.at)

    def named(self, code: _Opcode, begin: int, end: int) -> None:
        """Opcodes that hold the name of a global."""
        module, name, *_ = self.data[begin:end].split(b"\n")
        self._refers(module, name)
        self.plain(code, begin, end)

    def stacked(self, _code: _Opcode, _begin: int, _end: int) -> None:
        """The opcode that takes the name of a global from the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self._refers(self._text(module), self._text(name))
        self.stack.append(_ANY)

    def _refers(self, module: bytes, name: bytes) -> None:
        """Add a global, once."""
        if (module, name) not in self.seen:
            self.seen.add((module, name))
            self.globals.append((_shown(module), _shown(name)))

    def _text(self, item: int) -> bytes:
        if item < _TEXT:
            return b"?"
        at = item - _TEXT
        code = _OPCODES[self.data[at]]
        begin, end = _argument(code, self.data, at + 1)
        # no more than is shown: one long text may be taken from the memo by every opcode
        return self.data[begin : min(end - code.lines, begin + LONGEST)]

    def mark(self, _code: _Opcode, _begin: int, _end: int) -> None:
        self.stack.append(_MARK)

    def again(self, _code: _Opcode, _begin: int, _end: int) -> None:
        self.stack.append(self.stack[-1])

    def get(self, code: _Opcode, begin: int, end: int) -> None:
        self.stack.append(self.memo.get(self._index(code, begin, end), _ANY))

    def put(self, code: _Opcode, begin: int, end: int) -> None:
        index = self._index(code, begin, end)
        # the memo is an array that grows to the largest index
        if not 0 <= index < self.steps:
            raise CorruptFile("damaged pickle: a memo index out of range")
        self.memo[index] = self.stack[-1]

    def memoize(self, _code: _Opcode, _begin: int, _end: int) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def refused(self, code: _Opcode, _begin: int, _end: int) -> None:
        raise UnsafePickle(
            f"uses the opcode {code.name}, which torch.save never writes", hint=CONVERT
        )

    def bytes(self, _code: _Opcode, _begin: int, _end: int) -> None:
        # allocates its declared length before reading it
        raise CorruptFile("damaged pickle: a bytearray among the weights")

    def number(self, code: _Opcode, begin: int, end: int) -> None:
        length = end - begin - code.lines
        if code.lines:
            within("digits", length)
        small = length <= (_DIGITS if code.lines else _BYTES)
        self.stack.append(_ANY if small else _NO_KEY)

    def names(self, code: _Opcode, _begin: int, _end: int) -> None:
        """Opcodes that put names into tables and sets."""
        held = self._above() if code.taken < 0 else [self.stack.pop(), self.stack.pop()][::-1]
        keys = held if code.name in ("FROZENSET", "ADDITEMS") else held[::2]
        if _NO_KEY in keys:
            raise CorruptFile(
                "damaged pickle: a name in a table is neither text nor a small number"
            )
        if code.name in ("DICT", "FROZENSET"):
            self.stack.append(code.result)

    def tuple(self, code: _Opcode, _begin: int, _end: int) -> None:
        held = self._above() if code.taken < 0 else [self.stack.pop() for _ in range(code.taken)]
        named = len(held) <= _SHORT and all(one >= _TEXT for one in held)
        self.stack.append(_ANY if named else _NO_KEY)

    def _above(self) -> list[int]:
        """Pop everything down to the last mark, and the mark."""
        stack, at = self.stack, len(self.stack) - 1
        while stack[at] != _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        held = stack[at + 1 :]
        del stack[at:]
        return held

    def _index(self, code: _Opcode, begin: int, end: int) -> int:
        """The place in the memo; -1 for what is no number."""
        argument = self.data[begin : end - code.lines]
        if not code.lines:
            return int.from_bytes(argument, "little")
        return int(argument) if argument.isdigit() and len(argument) <= _DIGITS else -1


def _shown(raw: bytes) -> str:
    return raw[:LONGEST].decode("utf-8", "replace").strip("'\"")


_RULES: Mapping[str, Callable[[_Scan, _Opcode, int, int], None]] = {
    "MARK": _Scan.mark,
    "DUP": _Scan.again,
    "MEMOIZE": _Scan.memoize,
    "BYTEARRAY8": _Scan.bytes,
    "STACK_GLOBAL": _Scan.stacked,
    **dict.fromkeys(("GLOBAL", "INST"), _Scan.named),
    **dict.fromkeys(_TEXTS, _Scan.text),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), _Scan.get),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), _Scan.put),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), _Scan.number),
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), _Scan.tuple),
    **dict.fromkeys(("SETITEM", "SETITEMS", "DICT", "FROZENSET", "ADDITEMS"), _Scan.names),
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"), _Scan.refused
    ),
}

_OPCODES = {ord(code.code): _described(code) for code in pickletools.opcodes}
