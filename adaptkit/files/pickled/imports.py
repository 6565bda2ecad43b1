"""What a pickle names for import, listed without loading it, however much of it is refused."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import AdaptkitError
from adaptkit.files.limits import LIMITS, lifted, within
from adaptkit.files.pickled.catalogue import DAMAGED
from adaptkit.files.pickled.scanner import scan
from adaptkit.files.pickled.stand_ins import GLOBALS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["Imports", "imports"]

# pickles of the format before torch 1.6: magic number, protocol, system, object, storages
_LEGACY = 5


class Imports(NamedTuple):
    """What a torch file imports where it is loaded without `weights_only`.

    `foreign` are the globals that `weights_only` refuses, `script` whether it is TorchScript, which
    carries code, and `stopped` why the rest was not followed.
    """

    form: str
    foreign: tuple[str, ...]
    script: bool = False
    stopped: str | None = None


def imports(path: Path) -> Imports:
    """List the globals of all pickles in a torch file; `OSError` if it cannot be read."""
    found: list[tuple[str, str]] = []
    form, script, stopped = "pickle", False, None
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            form = "torch archive, a zip of a pickle"
        file.seek(0)
        try:
            if form == "pickle":
                _scan_all(_limited(file), found)
            else:
                with zipfile.ZipFile(file) as archive:
                    script = any("/code/" in name for name in archive.namelist())
                    for raw in _pickles(archive, path.stat().st_size):
                        scan(raw, 0, found)
        except AdaptkitError as error:
            stopped = error.message
        except (*DAMAGED, OSError) as error:  # an offset before the file is an OSError
            stopped = f"damaged: {error}"
    named = dict.fromkeys(
        f"{module}.{name}" for module, name in found if (module, name) not in GLOBALS
    )
    return Imports(form, tuple(named), script, stopped)


def _limited(file: BinaryIO) -> bytes:
    return file.read(-1 if lifted() else LIMITS["pickle size"].most)


def _scan_all(raw: bytes, found: list[tuple[str, str]]) -> None:
    """Follow pickles one after the other; what follows the last may be weights."""
    at = 0
    for _ in range(_LEGACY):
        at = scan(raw, at, found)
        if raw[at : at + 1] != b"\x80":
            return


def _pickles(archive: zipfile.ZipFile, size: int) -> Iterator[bytes]:
    entries = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
    within("pickle size", sum(info.file_size for info in entries))
    packed = (info.file_size for info in entries if info.compress_type != zipfile.ZIP_STORED)
    within("packed pickle", sum(packed), beyond=size // 4)
    for info in entries:
        with archive.open(info) as entry:
            yield entry.read(info.file_size)
