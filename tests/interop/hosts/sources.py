"""The sources of other programs, to be run: they lie in mirrors beside the checkout, and none is committed.

A mirror of `owner/name` is the git directory `owner+name/repo` in `../.mirror`, or in the folder that
ADAPTKIT_MIRRORS names. Where it is absent, its host has the version "absent", and what needs it is skipped.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from tests.synth import ROOT

MIRRORS = Path(os.environ.get("ADAPTKIT_MIRRORS", ROOT.parent / ".mirror"))
ABSENT = "absent"


def mirror(repository: str) -> Path:
    return MIRRORS / repository.replace("/", "+") / "repo"


def _git(repository: str, *arguments: str) -> bytes:
    command = ["git", f"--git-dir={mirror(repository)}", *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


@cache
def commit(repository: str) -> str:
    """The newest commit of a mirror, shortened; "absent" where there is none."""
    if not mirror(repository).is_dir():
        return ABSENT
    return _git(repository, "rev-parse", "--short=7", "HEAD").decode().strip()


@cache
def tree(repository: str, *paths: str) -> Path:
    """A folder with these files and folders of the newest commit, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="adaptkit-host-")
    _KEPT.append(folder)
    with tarfile.open(fileobj=io.BytesIO(_git(repository, "archive", "HEAD", *paths))) as files:
        # Python 3.11.2 has no filters
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        files.extractall(folder.name, **filters)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
