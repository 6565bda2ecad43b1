"""All errors that adaptkit raises on purpose, as one tree.

::

    AdaptkitError                     exit code 1
    ├── CorruptFile                   bytes that violate their file format
    │   ├── UnsafePickle              a pickle that would run code
    │   └── OverLimit                 a file that asks for more work than is stated
    ├── UnreadableFile                missing file, no permission, a folder without weights
    ├── UnknownAdapter                no (family, format) claims these keys
    ├── AmbiguousAdapter              several do, and the answer would change the output
    ├── NoSuchName                    an unknown family, format, algorithm or module
    ├── ShapeMismatch                 a tensor of the wrong shape
    ├── NotRepresentable              no exact form of the requested kind
    ├── Unclaimed                     keys or modules that would be lost
    ├── NothingToDo                   the inputs leave nothing to write
    ├── NonFinite                     NaN or infinity instead of a number
    ├── WouldOverwrite                the output exists
    ├── CannotWrite                   disk full, no permission, no such folder
    ├── NotEnoughMemory               one step needs more than the memory bound
    ├── InternalError                 anything else that happened to one file: a bug
    └── WrongUsage                    conflicting options or values: exit code 2, as in Click

An interrupt exits 130.

Low-level code raises with the facts it knows; `ops` adds file and slot; the command line prints
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
    "InternalError",
    "NoSuchName",
    "NonFinite",
    "NotEnoughMemory",
    "NotRepresentable",
    "NothingToDo",
    "OverLimit",
    "ShapeMismatch",
    "Unclaimed",
    "UnknownAdapter",
    "UnreadableFile",
    "UnsafePickle",
    "WouldOverwrite",
    "WrongUsage",
]


BUG = "this is a bug in adaptkit; set ADAPTKIT_DEBUG=1 to see the traceback"
# characters of an exception's own words: they may quote a file
LONGEST = 500
_INSTALL = "`adaptkit help install` has the lines for each system"


class AdaptkitError(Exception):
    """Root of the tree: `message`, `hint`, and the place."""

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
        """Add the place unless it is already known; returns self, to raise again."""
        if self.file is None and file is not None:
            self.file = str(file)
        if self.tensor is None:
            self.tensor = tensor
        return self

    def to_dict(self) -> dict[str, str | None]:
        """The JSON record of the error."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "file": self.file,
            "tensor": self.tensor,
        }

    def __str__(self) -> str:
        where = [
            part
            for part in (self.file, self.tensor and f"tensor {self.tensor!r}")
            if part and part not in self.message
        ]
        return ": ".join([*where, self.message])


class CorruptFile(AdaptkitError):
    """Bytes that violate their file format (truncated, overlapping, bad header)."""


class UnsafePickle(CorruptFile):
    """A pickle that refers to something other than plain tensors and containers."""


class OverLimit(CorruptFile):
    """A file that asks for more work or memory than the stated limits (files/limits.py)."""


class UnreadableFile(AdaptkitError):
    """A path that cannot be opened, or holds no weights."""


class UnknownAdapter(AdaptkitError):
    """A file whose keys no (family, format) pair claims."""


class AmbiguousAdapter(AdaptkitError):
    """A file that several families fit equally well, with different outputs."""


class NoSuchName(AdaptkitError):
    """An unknown name; the hint lists near matches or all names."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> NoSuchName:
        """Build the error for a `name` that is not among `known`."""
        from difflib import get_close_matches

        names = sorted(known)
        near = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        return cls(f"unknown {kind} {name!r}", hint=hint)


class ShapeMismatch(AdaptkitError):
    """A tensor of the wrong shape."""


class NotRepresentable(AdaptkitError):
    """A weight that has no exact form of the requested kind."""


class Unclaimed(AdaptkitError):
    """Keys or modules that would be lost (see `--allow-unused`)."""


class NothingToDo(AdaptkitError):
    """Inputs that leave nothing to write."""


class NonFinite(AdaptkitError):
    """NaN or infinity instead of a number."""


class WouldOverwrite(AdaptkitError):
    """An output that exists (see `--overwrite`)."""


class CannotWrite(AdaptkitError):
    """An output that cannot be written: disk full, no permission, no such folder."""


class NotEnoughMemory(AdaptkitError):
    """A step that needs more than the memory bound."""


class InternalError(AdaptkitError):
    """An error that adaptkit does not raise on purpose, with the file that it happened to."""

    @classmethod
    def of(cls, error: Exception) -> AdaptkitError:
        """The error to report for any exception of one file or one job; its cause is kept."""
        if isinstance(error, AdaptkitError):
            return error
        words = str(error)[:LONGEST]
        found: AdaptkitError
        if (fault := cls.of_torch(error)) is not None:
            return fault
        if isinstance(error, MemoryError) or "allocate memory" in words:
            found = NotEnoughMemory("out of memory", hint="free memory, or set a lower --memory")
        elif isinstance(error, OSError):
            found = UnreadableFile(error.strerror or words, file=error.filename)
        else:
            found = cls(f"unexpected {type(error).__name__}: {words}", hint=BUG)
        found.__cause__ = error
        return found

    @staticmethod
    def of_torch(error: BaseException) -> AdaptkitError | None:
        """The error to report if torch is missing, or importing it raised this exception."""
        name = getattr(error, "name", None) if isinstance(error, ImportError) else None
        missing = isinstance(error, ModuleNotFoundError) and name == "torch"
        trace, broken = error.__traceback__, name is not None and name.partition(".")[0] == "torch"
        while trace is not None and not broken:
            home = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
            broken = home == "torch" and trace.tb_frame.f_code.co_name == "<module>"
            trace = trace.tb_next
        if missing:
            found = AdaptkitError("PyTorch is not installed", hint=f"pip install torch; {_INSTALL}")
        elif broken:
            what = (str(error).strip() or type(error).__name__).partition("\n")[0][:LONGEST]
            hint = f"pip install --force-reinstall torch; {_INSTALL}"
            found = AdaptkitError(f"PyTorch cannot be imported: {what}", hint=hint)
        else:
            return None
        found.__cause__ = error
        return found


class WrongUsage(AdaptkitError):
    """Conflicting options, or a value that an option does not accept."""

    exit_code = 2
