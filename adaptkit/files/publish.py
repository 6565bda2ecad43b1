"""Publishing output: checks before writing, folders that appear as a whole, durable renames."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from adaptkit.errors import CannotWrite, WouldOverwrite
from adaptkit.files._exchange import exchange

if TYPE_CHECKING:
    from collections.abc import Iterator, Set
    from pathlib import Path

__all__ = [
    "cannot_write",
    "check_folder",
    "check_target",
    "publish_folder",
    "refuse_existing",
    "sync_folder",
]


def cannot_write(path: Path, error: OSError, needed: int) -> CannotWrite:
    """The `CannotWrite` that says what the operating system said, and what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return CannotWrite(
            f"the disk is full: {needed} bytes are needed", file=path, hint="free space or use -o"
        )
    if isinstance(error, PermissionError):
        hint = "check the mode of the folder; on Windows, close whatever holds the file open"
        return CannotWrite("no permission to write here", file=path, hint=hint)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if error.errno == errno.EROFS:
        return CannotWrite("the disk is read-only", file=path, hint="choose another output with -o")
    return CannotWrite(f"cannot be written: {error.strerror or error}", file=path)


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise WouldOverwrite(
            "the output exists", file=path, hint="use --overwrite, or another name with -o"
        )


def check_target(path: Path, needed: int, overwrite: bool) -> None:
    """Everything about the output's place that can be known before a byte is written."""
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
            raise CannotWrite("the output is a device or pipe, no file", file=path)
        if not overwrite:
            refuse_existing(path)
    except OSError as error:
        raise cannot_write(path, error, needed) from error
    _check_space(path, needed)


def _check_space(path: Path, needed: int) -> None:
    import shutil

    try:
        usage = shutil.disk_usage(path.parent)
    except OSError:  # a file system that does not tell; the write itself will
        return
    if usage.total and usage.free < needed:
        message = f"the disk is too full: {needed} bytes are needed, {usage.free} are free"
        raise CannotWrite(message, file=path, hint="free space, or choose another disk with -o")


def sync_folder(folder: Path) -> None:
    """Make the rename durable where a folder can be synced (not on Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def publish_folder(path: Path, known: Set[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which appears as `path` when the block ends well, and vanishes when it does not.

    An existing folder is replaced (`overwrite`) only if it holds nothing but files of the `known` names: at once on Linux
    and macOS, elsewhere by two renames, between which a killed process leaves only the hidden `.old` beside `path`.
    """
    check_folder(path, known, overwrite)
    token = f"{os.getpid()}-{os.urandom(4).hex()}"
    made, old = (path.with_name(f".{path.name[:48]}.{token}.{end}") for end in ("part", "old"))
    try:
        made.mkdir()
        yield made
        check_folder(path, known, overwrite)  # a long while later
        if not (
            path.exists() and exchange(made, path)
        ):  # after an exchange, `made` is the old folder
            if path.exists():
                path.rename(old)
            made.rename(path)
    except OSError as error:
        raise cannot_write(path, error, 0) from error
    finally:
        _remove_folder(made)
        if old.exists() and not path.exists():
            old.rename(path)
        _remove_folder(old)
    sync_folder(path.parent)


def _remove_folder(path: Path) -> None:
    """Remove what is there, if anything; of a link to a folder, the link."""
    import shutil

    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_folder(path: Path, known: Set[str], overwrite: bool) -> None:
    """Refuse an output folder that cannot be made, or whose replacement would destroy something else."""
    if not path.parent.is_dir():
        raise CannotWrite(
            f"there is no folder {str(path.parent)!r}", file=path, hint="create it first"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise WouldOverwrite(
            "this format is a folder, and a file of that name exists",
            file=path,
            hint="name another",
        )
    if not overwrite:
        refuse_existing(path)
    strange = sorted(item.name for item in path.iterdir() if item.name not in known)
    if strange:
        raise WouldOverwrite(
            f"the folder holds other things, {strange[0]!r}: it is not replaced",
            file=path,
            hint="name another folder",
        )
