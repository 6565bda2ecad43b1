"""The adapters and checkpoints that files, folders and globs hold."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.errors import WrongUsage
from adaptkit.files.hub import local
from adaptkit.meaning import PEFT_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from os import PathLike

__all__ = ["SUFFIXES", "expand", "found_in", "is_one", "matching"]

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


def found_in(paths: Iterable[str | PathLike[str]]) -> Iterator[tuple[Path, str]]:
    """Every file of files, folders and globs, with its name as a table shows it.

    A folder that is one model or adapter (diffusers, PEFT, shards) is one item wherever it stands;
    names of what lies in any other folder are relative to that folder, and begin with its name if
    there are several.
    """
    arguments = list(map(local, paths))
    for given in arguments:
        base, matched = _matched(given)
        for path in matched:
            if path.is_dir() and not is_one(path):
                inside = list(_inside(path))
                several = path.parent if len(arguments) > 1 else path
                start = several if path == given else base
                yield from ((one, one.relative_to(start).as_posix()) for one in inside)
                if not inside:
                    yield path, path.name
            else:
                yield path, path.name if path == given else path.relative_to(base).as_posix()


def _matched(given: Path) -> tuple[Path, list[Path]]:
    """The paths that a glob matches, and the folder before its first wildcard."""
    if given.exists() or not glob.has_magic(str(given)):
        return given, [given]
    first = next(n for n, part in enumerate(given.parts) if glob.has_magic(part))
    base = Path(*given.parts[:first])
    return base, matching(base, "/".join(given.parts[first:])) or [given]


def matching(base: Path, pattern: str) -> list[Path]:
    """The sorted paths below a folder that match a glob; WrongUsage for what is none."""
    try:
        return sorted(base.glob(pattern))
    except (ValueError, NotImplementedError, RecursionError) as error:
        raise WrongUsage(f"{pattern!r} is no glob: {error}") from None


def expand(paths: Iterable[str | PathLike[str]]) -> Iterator[Path]:
    """The files of `found_in` without their names."""
    return (path for path, _ in found_in(paths))


def _inside(folder: Path) -> Iterator[Path]:
    try:
        children = sorted(folder.iterdir())
    except OSError:
        yield folder  # its report says why it cannot be read
        return
    for child in children:
        if child.is_dir():
            if is_one(child):
                yield child
            elif not child.is_symlink():  # which may lead back
                yield from _inside(child)
        elif child.suffix.lower() in SUFFIXES and child.is_file():
            yield child


def is_one(folder: Path) -> bool:
    """Whether a folder is one model or adapter."""
    try:
        if any((folder / name).is_file() for name in ("model_index.json", PEFT_CONFIG)):
            return True
        return any(folder.glob("*.index.json")) or any(folder.glob("unet/*.safetensors"))
    except OSError:
        return False
