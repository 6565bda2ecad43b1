"""Every error adaptkit raises on purpose, as one tree.

::

    AdaptkitError                     exit code 1
    ├── CorruptFile                   bytes that are not what their format promises
    │   └── UnsafePickle              a pickle that asks to run code
    ├── UnreadableFile                missing, no permission, a folder without weights
    ├── UnknownAdapter                no (family, format) claims these keys
    ├── AmbiguousAdapter              several do, and the answer would change the output
    ├── NoSuchName                    a family, format, algorithm or module nobody knows
    ├── ShapeMismatch                 a tensor whose shape does not fit its place
    ├── NotRepresentable              exact in no form of the requested kind
    ├── Unclaimed                     keys or modules that would be lost
    ├── NothingToDo                   the inputs leave nothing to write
    ├── NonFinite                     NaN or infinity where a number must stand
    ├── WouldOverwrite                the output exists
    ├── CannotWrite                   disk full, no permission, no such folder
    ├── NotEnoughMemory               one step needs more than the bound
    └── WrongUsage                    options that contradict one another: exit code 2, as Click's own

An interrupt exits 130.

Deep code raises with the facts it knows; `ops` adds file and slot; the command line prints
``error:`` and ``hint:``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "AdaptkitError",
    "AmbiguousAdapter",
    "CannotWrite",
    "CorruptFile",
    "NoSuchName",
    "NonFinite",
    "NotEnoughMemory",
    "NotRepresentable",
    "NothingToDo",
    "ShapeMismatch",
    "Unclaimed",
    "UnknownAdapter",
    "UnreadableFile",
    "UnsafePickle",
    "WouldOverwrite",
    "WrongUsage",
]


class AdaptkitError(Exception):
    """Root of the tree: `message` says what is wrong, `hint` what to do, `file` and `tensor` where."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        file: object | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.file = None if file is None else str(file)
        self.tensor = tensor

    def at(self, *, file: object | None = None, tensor: str | None = None) -> AdaptkitError:
        """Add where it happened, keeping what deeper code already said; returns self, to raise again."""
        if self.file is None and file is not None:
            self.file = str(file)
        if self.tensor is None:
            self.tensor = tensor
        return self

    def __str__(self) -> str:
        where = [
            part
            for part in (self.file, self.tensor and f"tensor {self.tensor!r}")
            if part and part not in self.message
        ]
        return ": ".join([*where, self.message])


class CorruptFile(AdaptkitError):
    """The bytes are not what their format promises (truncated, overlapping, bad header)."""


class UnsafePickle(CorruptFile):
    """A pickle that refers to something other than plain tensors and containers."""


class UnreadableFile(AdaptkitError):
    """The path cannot be opened, or holds no weights."""


class UnknownAdapter(AdaptkitError):
    """No (family, format) pair claims the keys of this file."""


class AmbiguousAdapter(AdaptkitError):
    """Several families fit equally well and the answer would change the output."""


class NoSuchName(AdaptkitError):
    """A name that nobody knows; the hint lists near matches or all of them."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> NoSuchName:
        """Build the error for `name`, which is not one of the `known` names of this `kind`."""
        from difflib import get_close_matches

        names = sorted(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        return cls(f"unknown {kind} {name!r}", hint=hint)


class ShapeMismatch(AdaptkitError):
    """A tensor's shape does not fit its place."""


class NotRepresentable(AdaptkitError):
    """The requested kind has no exact form for this weight."""


class Unclaimed(AdaptkitError):
    """Keys or modules that would be lost (see `--allow-unused`)."""


class NothingToDo(AdaptkitError):
    """The inputs leave nothing to write."""


class NonFinite(AdaptkitError):
    """NaN or infinity where a number must stand."""


class WouldOverwrite(AdaptkitError):
    """The output exists (see `--overwrite`)."""


class CannotWrite(AdaptkitError):
    """The output cannot be written: disk full, no permission, no such folder."""


class NotEnoughMemory(AdaptkitError):
    """One step needs more than the memory bound."""


class WrongUsage(AdaptkitError):
    """Options that contradict one another, or a value that an option does not take."""

    exit_code = 2
