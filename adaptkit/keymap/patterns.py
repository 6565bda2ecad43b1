"""Match module names against the patterns of a configuration, in bounded work.

PEFT takes `alpha_pattern` and `rank_pattern` as regular expressions that match the end of a
module's name (`get_pattern_key` in peft/utils/other.py). Python's `re` backtracks, so a pattern
from a file can keep it busy for ever. Here all patterns of a table become one automaton without
backtracking: the work for a name grows with its length only, and the total is limited.

Literals, `.`, classes, groups, `|` and the quantifiers are known. Look-around, back references and
flags are refused, which no file was seen to use.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import CorruptFile
from adaptkit.files.limits import LIMITS, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Patterns"]

# (least, most) repeats of a quantifier; None has no end
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_BRACES = re.compile(r"\{(?:(\d{1,9})?(,)(\d{1,9})?|(\d{1,9}))\}")
_CLASSES = {"d": r"\d", "w": r"\w", "s": r"\s", "D": r"\D", "W": r"\W", "S": r"\S"}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
# steps that a state counts for, as it takes memory
_NODE = 6
_SPECIAL = frozenset("\\^$*+?()[]{}|")


class _Node:
    """A state: where each character leads, and where no character is needed."""

    __slots__ = ("accepts", "empty", "gates", "letters", "others")

    def __init__(self) -> None:
        self.letters: dict[str, _Node] | None = None
        self.others: tuple[tuple[Callable[[str], object], _Node], ...] = ()
        self.empty: tuple[_Node, ...] = ()
        # passed at the beginning (^) or the end ($) of a name only
        self.gates: tuple[tuple[str, _Node], ...] = ()
        self.accepts: int | None = None


class _Set(NamedTuple):
    """The states after some characters, with the first pattern that accepts there."""

    nodes: frozenset[_Node]
    accepts: int | None


class Patterns:
    """The patterns of a table, in its order; the first that matches counts.

    Raises `CorruptFile` for what is no pattern, and `OverLimit` for too many, too long ones, or
    too much work.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        texts = list(patterns)
        within("patterns", len(texts))
        within("pattern length", max(map(len, texts), default=0))
        self._steps = 0
        self._made: dict[frozenset[_Node], _Set] = {}
        self._next: dict[tuple[_Set, object], _Set] = {}
        # patterns match from every dot on; those that begin with ^ only from the first letter
        whole, later = _Node(), _Node()
        whole.empty = (later,)
        for number, text in enumerate(texts):
            end = _Parser(text, self).parse(whole, later)
            end.accepts = number if end.accepts is None else end.accepts
        self._whole = self._closed([whole], "^")
        self._later = self._closed([later])

    def first(self, name: str) -> int | None:
        """The number of the first pattern that matches the name, or its end after a dot."""
        here, later = self._whole, True
        for letter in name:
            here = self._after(here, letter)
            # PEFT's `.*` before the dot does not cross a line
            later = later and letter != "\n"
            if letter == "." and later:
                here = self._joined(here)
        return self._closed(here.nodes, "$" if name else "^$").accepts

    def spend(self, steps: int) -> None:
        """Count work; `OverLimit` if it is too much."""
        self._steps += steps
        if self._steps > LIMITS["pattern steps"].most:
            within("pattern steps", self._steps)

    def _after(self, here: _Set, letter: str) -> _Set:
        found = self._next.get((here, letter))
        if found is None:
            self.spend(1 + len(here.nodes))
            reached = []
            for node in here.nodes:
                if node.letters is not None and letter in node.letters:
                    reached.append(node.letters[letter])
                reached += [to for test, to in node.others if test(letter)]
            found = self._next[here, letter] = self._closed(reached)
        return found

    def _joined(self, here: _Set) -> _Set:
        """The states after a dot, where every pattern may begin."""
        found = self._next.get((here, None))
        if found is None:
            found = self._next[here, None] = self._closed([*here.nodes, *self._later.nodes])
        return found

    def _closed(self, nodes: Iterable[_Node], gate: str = "") -> _Set:
        """The states reached from some without a character."""
        seen = set(nodes)
        todo = list(seen)
        while todo:
            node = todo.pop()
            for to in (*node.empty, *(to for kind, to in node.gates if kind in gate)):
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        key = frozenset(seen)
        if key not in self._made:
            self.spend(len(key))
            accepts = min((n.accepts for n in key if n.accepts is not None), default=None)
            self._made[key] = _Set(key, accepts)
        return self._made[key]


class _Parser:
    """A pattern, added to the automaton from left to right."""

    def __init__(self, text: str, owner: Patterns) -> None:
        self.text, self.at, self.owner = text, 0, owner
        self.depth = 0

    def parse(self, whole: _Node, later: _Node) -> _Node:
        """Add the pattern behind the first states; returns its last one."""
        first = self.text.startswith("^")
        if _SPECIAL.isdisjoint(self.text[first:]):
            end = self._shared(whole if first else later, self.text[first:])
        else:
            end = self._choice(later)
        if self.at < len(self.text):
            raise self._wrong("unbalanced )")
        return end

    def _shared(self, node: _Node, text: str) -> _Node:
        """A plain name: patterns that begin alike share their states."""
        for letter in text:
            if letter == ".":
                node = self._dot(node)
            else:
                node.letters = node.letters or {}
                if letter not in node.letters:
                    node.letters[letter] = self._node()
                node = node.letters[letter]
        self.at = len(self.text)
        return node

    def _dot(self, node: _Node) -> _Node:
        """The state behind any letter, shared by the patterns that come here."""
        shared = (to for test, to in node.others if test is _no_newline)
        return next(shared, None) or self._edge(node, _no_newline)

    def _choice(self, start: _Node) -> _Node:
        end = self._node()
        while True:
            first = self._node()
            start.empty += (first,)
            self._sequence(first).empty += (end,)
            if not self._took("|"):
                return end

    def _sequence(self, node: _Node) -> _Node:
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            begin = self.at
            first = self._node()
            last = self._atom(first)
            after = self.at
            least, most = self._quantifier()
            resume, self.at = self.at, begin
            node = self._repeated(node, first, last, (least, most), (begin, after))
            self.at = resume
        return node

    def _repeated(
        self,
        node: _Node,
        first: _Node,
        last: _Node,
        times: tuple[int, int | None],
        text: tuple[int, int],
    ) -> _Node:
        """Chain copies of an atom, parsed anew for each."""
        least, most = times
        ends: list[_Node] = []
        if most == 0:
            return node
        for number in range(max(least, most or 1)):
            if number:
                self.at = text[0]
                first = self._node()
                last = self._atom(first)
            if number >= least:
                ends.append(node)
            node.empty += (first,)
            if most is None and number >= least - 1:
                last.empty += (first,)
            node = last
        out = self._node()
        for end in (node, *ends):
            end.empty += (out,)
        return out

    def _quantifier(self) -> tuple[int, int | None]:
        if self.at >= len(self.text):
            return 1, 1
        found = _QUANTIFIERS.get(self.text[self.at])
        if found is not None:
            self.at += 1
        elif brace := _BRACES.match(self.text, self.at):
            self.at = brace.end()
            least = int(brace[1] or brace[4] or 0)
            most = int(brace[3]) if brace[3] else None if brace[2] else least
            if most is not None and most < least:
                raise self._wrong("min repeat greater than max repeat")
            found = least, most
        else:
            return 1, 1
        # a lazy quantifier matches the same names
        if not self._took("?") and self._repeats(self.at):
            raise self._wrong("multiple repeat or possessive quantifier")
        return found

    def _repeats(self, at: int) -> bool:
        """Whether a quantifier stands here."""
        return self.text[at : at + 1] in _QUANTIFIERS or _BRACES.match(self.text, at) is not None

    def _atom(self, node: _Node) -> _Node:
        letter = self.text[self.at]
        self.at += 1
        if letter == "(":
            return self._group(node)
        if letter == "[":
            return self._class(node)
        if letter == ".":
            return self._edge(node, _no_newline)
        if letter == "\\":
            return self._escape(node)
        if letter in "^$":
            end = self._node()
            node.gates += ((letter, end),)
            return end
        if self._repeats(self.at - 1):
            raise self._wrong("nothing to repeat")
        return self._letter(node, letter)

    def _group(self, node: _Node) -> _Node:
        if self._took("?") and not self._took(":"):
            name = re.compile(r"P<[^\W\d]\w*>").match(self.text, self.at)
            if name is None:
                raise self._wrong("look-around, flags or a reference")
            self.at = name.end()
        self.depth += 1
        if self.depth > LIMITS["JSON depth"].most:
            raise self._wrong("groups are nested too deep")
        end = self._choice(node)
        self.depth -= 1
        if not self._took(")"):
            raise self._wrong("missing )")
        return end

    def _class(self, node: _Node) -> _Node:
        """A class of letters, which `re` itself tests: one letter needs no backtracking."""
        end = self.at
        end += self.text.startswith("^", end)
        end += self.text.startswith("]", end)
        while end < len(self.text) and self.text[end] != "]":
            end += 1 + (self.text[end] == "\\")
        if end >= len(self.text):
            raise self._wrong("missing ]")
        text = self.text[self.at - 1 : end + 1]
        self.at = end + 1
        return self._edge(node, self._compiled(text))

    def _escape(self, node: _Node) -> _Node:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter in _CLASSES:
            return self._edge(node, self._compiled(_CLASSES[letter]))
        if letter in _CONTROLS:
            return self._letter(node, _CONTROLS[letter])
        if not letter or (letter.isascii() and letter.isalnum()):
            raise self._wrong(f"the escape \\{letter}")
        return self._letter(node, letter)

    def _compiled(self, text: str) -> Callable[[str], object]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a later Python may mean by [[
                return re.compile(text).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise self._wrong(str(error)) from None

    def _edge(self, node: _Node, test: Callable[[str], object]) -> _Node:
        end = self._node()
        node.others += ((test, end),)
        return end

    def _letter(self, node: _Node, letter: str) -> _Node:
        end = self._node()
        node.letters = {**(node.letters or {}), letter: end}
        return end

    def _node(self) -> _Node:
        self.owner.spend(_NODE)
        return _Node()

    def _took(self, letter: str) -> bool:
        found = self.text.startswith(letter, self.at)
        self.at += found
        return found

    def _wrong(self, what: str) -> CorruptFile:
        shown = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return CorruptFile(f"the pattern {shown!r} cannot be matched: {what}")


def _no_newline(letter: str) -> bool:
    return letter != "\n"
