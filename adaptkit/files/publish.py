"""Publishing output: checks before writing, folders that appear as a whole, durable renames."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from adaptkit.errors import CannotWrite, WouldOverwrite
from adaptkit.files._exchange import exchange, rename_new
from adaptkit.files.leftovers import forget, hidden, remove_dead

if TYPE_CHECKING:
    from collections.abc import Iterator, Set
    from pathlib import Path

__all__ = [
    "cannot_write",
    "check_folder",
    "check_target",
    "exists",
    "publish_folder",
    "refuse_existing",
    "sync_folder",
]


def cannot_write(path: Path, error: OSError, needed: int) -> CannotWrite | WouldOverwrite:
    """Turn an `OSError` into a `CannotWrite` with the system's message and a hint."""
    if isinstance(error, FileExistsError):
        return exists(path)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return CannotWrite(
            f"the disk is full: {needed} bytes are needed", file=path, hint="free space or use -o"
        )
    if isinstance(error, PermissionError):
        hint = "check the mode of the folder; on Windows, close the program that has the file open"
        return CannotWrite("permission denied", file=path, hint=hint)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if error.errno == errno.EROFS:
        return CannotWrite("the disk is read-only", file=path, hint="choose another output with -o")
    return CannotWrite(f"cannot be written: {error.strerror or error}", file=path)


def refuse_existing(path: Path) -> None:
    """Raise `WouldOverwrite` if the path exists."""
    if path.exists():
        raise exists(path)


def exists(path: Path) -> WouldOverwrite:
    """The error for an output that exists."""
    return WouldOverwrite(
        "the output exists", file=path, hint="use --overwrite, or another name with -o"
    )


def check_target(path: Path, needed: int, overwrite: bool) -> None:
    """Check the output path before a byte is written."""
    if "\0" in str(path):
        raise CannotWrite("a file name cannot hold a null character", file=repr(str(path)))
    try:
        if path.is_dir():
            raise CannotWrite("the output is a folder", file=path, hint="name a file in it")
        if not path.parent.is_dir():
            raise CannotWrite(
                f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
            )
        if path.exists() and not path.is_file():
            raise CannotWrite("the output is a device or pipe, not a file", file=path)
        if not overwrite:
            refuse_existing(path)
    except OSError as error:
        raise cannot_write(path, error, needed) from error
    _check_space(path, needed)


def _check_space(path: Path, needed: int) -> None:
    import shutil

    try:
        usage = shutil.disk_usage(path.parent)
    except OSError:  # some file systems report no usage; the write itself will fail
        return
    if usage.total and usage.free < needed:
        message = f"not enough disk space: {needed} bytes are needed, {usage.free} are free"
        raise CannotWrite(message, file=path, hint="free space, or choose another disk with -o")


def sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems that can sync a folder (not Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def publish_folder(path: Path, known: Set[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill that becomes `path` on success.

    It is removed on failure.

    An existing folder is replaced (`overwrite`) only if all its files are of the `known` names.
    The replacement is atomic on Linux and macOS. Elsewhere it takes two renames; a process killed
    between them leaves only the hidden `.old` folder.
    """
    check_folder(path, known, overwrite)
    remove_dead(path)
    made = hidden(path)
    old = made.with_suffix(".old")
    try:
        made.mkdir()
        yield made
        check_folder(path, known, overwrite)  # again: writing may have taken hours
        # after an exchange, `made` is the old folder
        if not (path.exists() and exchange(made, path)):
            if path.exists():
                path.rename(old)
            rename_new(made, path)
    except OSError as error:
        raise cannot_write(path, error, 0) from error
    finally:
        _remove_folder(made)
        forget(made)
        # the second rename failed: put the old folder back
        if old.exists() and not path.exists():
            old.rename(path)
        _remove_folder(old)
    sync_folder(path.parent)


def _remove_folder(path: Path) -> None:
    """Remove a folder, if any; of a symbolic link, only the link."""
    import shutil

    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_folder(path: Path, known: Set[str], overwrite: bool) -> None:
    """Refuse an output folder that cannot be created, or that holds unrelated files."""
    if not path.parent.is_dir():
        raise CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise WouldOverwrite(
            "this format writes a folder, and a file of that name exists",
            file=path,
            hint="choose another name",
        )
    if not overwrite:
        refuse_existing(path)
    strange = sorted(item.name for item in path.iterdir() if item.name not in known)
    if strange:
        raise WouldOverwrite(
            f"the folder holds other files ({strange[0]!r}) and is not replaced",
            file=path,
            hint="choose another folder",
        )
