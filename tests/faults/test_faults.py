"""Each fault of a disk under whole commands: one line, nothing left, the old output as it was.

By default each fault meets one command; `python -m tests.faults` meets all.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptkit.files import spool
from tests.cli.test_cli import adaptkit
from tests.faults.disk import SYSTEMS, Disk, failure
from tests.synth import FIXTURES

TINY = FIXTURES / "tiny"
COMMANDS = {
    "convert": ("convert", "lora.safetensors", "--to", "comfy"),
    "resize": ("resize", "lora.safetensors", "--rank", "1"),
    "merge": ("merge", "base.safetensors", "lora.safetensors"),
    "extract": ("extract", "base.safetensors", "tuned.safetensors", "--rank", "1"),
    "folder": ("convert", "lora.safetensors", "--to", "peft", "--only", "unet"),
}
on_both = pytest.mark.parametrize("system", SYSTEMS)
WHOLE = "ADAPTKIT_FAULTS" in os.environ  # set by `python -m tests.faults`
_turns = itertools.cycle(COMMANDS)


def with_all(test: Any) -> Any:
    """With every command, or in a share of the time with one after the other."""
    return pytest.mark.parametrize("command", COMMANDS if WHOLE else [next(_turns)])(test)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What each command writes on a disk without a fault."""
    found = {}
    for name in COMMANDS:
        home = tmp_path_factory.mktemp(name)
        prepared(home)
        done = run(home, name)
        assert done.returncode == 0, done.stderr
        found[name] = state(home / "out")
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return prepared(tmp_path)


def prepared(home: Path) -> Path:
    shutil.copy(TINY / "lora-kohya.safetensors", home / "lora.safetensors")
    shutil.copy(TINY / "base.safetensors", home / "base.safetensors")
    shutil.copy(TINY / "tuned.safetensors", home / "tuned.safetensors")
    (home / "out").mkdir()
    return home


def run(home: Path, name: str) -> Any:
    target = home / "out" / ("made" if name == "folder" else "made.safetensors")
    command, *rest = COMMANDS[name]
    inputs = [str(home / one) if one.endswith(".safetensors") else one for one in rest]
    return adaptkit(command, *inputs, "-o", str(target), "--overwrite")


def state(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def old(home: Path, name: str) -> dict[str, bytes]:
    """An output of an earlier run, which a fault must leave as it is."""
    if name == "folder":
        (home / "out" / "made").mkdir()
        for one in ("adapter_model.safetensors", "adapter_config.json"):
            (home / "out" / "made" / one).write_bytes(b"old")
    else:
        (home / "out" / "made.safetensors").write_bytes(b"old")
    return state(home / "out")


def refused(done: Any, *words: str) -> None:
    assert done.returncode == 1, (done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("hint:")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error:")
    for word in words:
        assert word in errors[0], errors[0]


def fails(home: Path, name: str, disk: Disk, *words: str) -> None:
    """The command ends in one line, leaves nothing, and the old output stays."""
    before = old(home, name)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        done = run(home, name)
    refused(done, *words)
    assert state(home / "out") == before


def works(home: Path, name: str, disk: Disk, wanted: dict[str, bytes]) -> None:
    """The command writes the bytes that it writes without a fault, and nothing else."""
    old(home, name)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        done = run(home, name)
    assert done.returncode == 0, done.stderr
    assert state(home / "out") == wanted


# the layer itself -----------------------------------------------------------------------------


@on_both
@with_all
def test_the_layer_sees_every_call(home: Path, system: str, command: str, whole: Any) -> None:
    disk = Disk(home, system)
    works(home, command, disk, whole[command])
    assert {"open", "read", "write", "size", "sync", "close"} <= set(disk.seen)
    assert {"replace", "renameat2", "rename"} & set(disk.seen)


# reads and writes that do less than they were asked ------------------------------------------


class Short(Disk):
    def reading(self, path: Path, length: int) -> int:
        return max(1, length // 3)

    def writing(self, path: Path, length: int) -> int:
        return max(1, length // 3)


@on_both
@with_all
def test_short_reads_and_writes_are_continued(
    home: Path, system: str, command: str, whole: Any
) -> None:
    works(home, command, Short(home, system), whole[command])


# a disk that is full --------------------------------------------------------------------------


class Full(Disk):
    """Room for so many bytes of outputs; the write that crosses the end is cut short."""

    room = 0

    def writing(self, path: Path, length: int) -> int:
        with self.lock:
            if not self.room:
                raise failure(errno.ENOSPC)
            taken = min(length, self.room)
            self.room -= taken
            return taken


def places(size: int) -> Iterator[int]:
    """The first and last bytes, around the header's length, and moments between."""
    yield from (0, 1, 7, 8, 9)
    yield from (size * n // 7 for n in range(1, 7))
    yield from (size - 1,)


@on_both
@pytest.mark.parametrize("place", range(12) if WHOLE else (0, 2, 4, 7, 11))
def test_a_disk_that_is_full_at_any_byte(home: Path, system: str, place: int, whole: Any) -> None:
    disk = Full(home, system)
    size = len(whole["convert"]["made.safetensors"])
    disk.room = list(places(size))[place]
    fails(home, "convert", disk, "disk is full")


@on_both
@with_all
@pytest.mark.parametrize("share", [0, 0.5, 0.99] if WHOLE else [0.99])
def test_a_disk_that_fills_under_each_command(
    home: Path, system: str, command: str, share: float, whole: Any
) -> None:
    disk = Full(home, system)
    disk.room = int(share * sum(map(len, whole[command].values())))
    fails(home, command, disk, "disk is full")


class NoRoom(Disk):
    def sizing(self, path: Path, size: int) -> None:
        raise failure(errno.ENOSPC)


@on_both
@with_all
def test_a_disk_that_is_full_before_the_first_byte(home: Path, system: str, command: str) -> None:
    fails(home, command, NoRoom(home, system), "disk is full")


# devices that fail ----------------------------------------------------------------------------


class Failing(Disk):
    """The call with this number fails."""

    call, number, code = "", 0, errno.EIO

    def _count(self, call: str, path: Path, inside: str) -> None:
        if call == self.call and (path.parent.name == inside or inside in path.parts):
            with self.lock:
                self.number -= 1
                if self.number < 0:
                    raise failure(self.code)


class BadRead(Failing):
    def reading(self, path: Path, length: int) -> int:
        if path.suffix == ".safetensors" and path.parent == self.root:
            self._count("read", path, self.root.name)
        return length


class BadWrite(Failing):
    def writing(self, path: Path, length: int) -> int:
        self._count("write", path, "out")
        return length


@on_both
@pytest.mark.parametrize("number", [0, 1, 5] if WHOLE else [1])
@with_all
def test_a_source_that_cannot_be_read(home: Path, system: str, command: str, number: int) -> None:
    disk = BadRead(home, system)
    disk.call, disk.number = "read", number
    fails(home, command, disk, ".safetensors", os.strerror(errno.EIO))


@on_both
@pytest.mark.parametrize("number", [0, 1] if WHOLE else [1])
@with_all
def test_an_output_that_cannot_be_written(
    home: Path, system: str, command: str, number: int
) -> None:
    disk = BadWrite(home, system)
    disk.call, disk.number = "write", number
    fails(home, command, disk, "made", os.strerror(errno.EIO))


class BadSync(Disk):
    def syncing(self, path: Path) -> None:
        if path != self.root:
            raise failure(errno.EIO)


@on_both
@with_all
def test_a_sync_that_fails_publishes_nothing(home: Path, system: str, command: str) -> None:
    """After it, the kernel may have dropped the pages: the file cannot be trusted."""
    fails(home, command, BadSync(home, system), os.strerror(errno.EIO))


class BadFolderSync(Disk):
    def syncing(self, path: Path) -> None:
        if path == self.root:
            raise failure(errno.EINVAL)


@with_all
def test_a_file_system_that_cannot_sync_folders_will_do(
    home: Path, command: str, whole: Any
) -> None:
    works(home, command, BadFolderSync(home, "posix"), whole[command])


class BadClose(Disk):
    def closing(self, path: Path, writing: bool) -> None:
        if writing:
            raise failure(errno.EDQUOT)


@on_both
@with_all
def test_a_close_that_fails_publishes_nothing(home: Path, system: str, command: str) -> None:
    """As of network file systems, which write when a file is closed."""
    fails(home, command, BadClose(home, system), "disk is full")


# names ----------------------------------------------------------------------------------------


class NoRename(Disk):
    def renaming(self, source: Path, target: Path) -> None:
        if target.parent == self.root / "out":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))


@on_both
@with_all
def test_a_rename_that_is_refused(home: Path, system: str, command: str) -> None:
    """As by a virus scanner, or a program that has the old output open."""
    fails(home, command, NoRename(home, system), "permission denied")


class NoOpen(Disk):
    def opening(self, path: Path, writing: bool) -> None:
        if writing:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@on_both
@with_all
def test_a_folder_that_takes_no_file(home: Path, system: str, command: str) -> None:
    fails(home, command, NoOpen(home, system), "permission denied")


class Reader(Disk):
    """Another program reads the old output."""

    def held(self, path: Path) -> None:
        if self.windows and path.name == "made.safetensors":
            raise PermissionError(errno.EACCES, "the file is in use", str(path))


def test_an_old_output_that_is_open_on_windows(home: Path) -> None:
    fails(home, "convert", Reader(home, "windows"), "permission denied")


class NoRemove(Disk):
    """Nothing can be removed, and the disk is full."""

    broken = True

    def removing(self, path: Path) -> None:
        if self.broken:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def writing(self, path: Path, length: int) -> int:
        if self.broken:
            raise failure(errno.ENOSPC)
        return length


@on_both
def test_what_could_not_be_removed_goes_with_the_next_run(
    home: Path, system: str, whole: Any
) -> None:
    disk = NoRemove(home, system)
    before = old(home, "convert")
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        refused(run(home, "convert"), "disk is full")
        left = state(home / "out").keys() - before.keys()
        assert [name.endswith(".part") for name in left] == [True]
        disk.broken = False
        assert run(home, "convert").returncode == 0
    assert state(home / "out") == whole["convert"]


# the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["resize", "extract"])
def test_a_temporary_folder_that_is_full(
    home: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results wait in memory, then in a file, until the header is known."""

    class Tight:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, _: object) -> int:
            raise failure(errno.ENOSPC)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    plain = tempfile.TemporaryFile
    made = []

    def tight(*rest: Any, **more: Any) -> Any:
        made.append(more)
        return Tight(plain(*rest, **more))

    monkeypatch.setattr(tempfile, "TemporaryFile", tight)
    kept = spool.Spool.__init__
    monkeypatch.setattr(spool.Spool, "__init__", lambda self, _, folder: kept(self, 100, folder))
    before = old(home, command)
    refused(run(home, command), "disk is full")
    assert made
    assert state(home / "out") == before


@on_both
@pytest.mark.parametrize("jump", [-4e9, -3600.0, 3600.0, 4e9] if WHOLE else [-4e9, 3600.0])
@with_all
def test_a_clock_that_jumps(
    home: Path, system: str, command: str, jump: float, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two calls, and sources from another century."""
    real, calls = time.time, [0]

    def clock() -> float:
        calls[0] += 1
        return max(0.0, real() + (jump if calls[0] % 2 else 0.0))

    monkeypatch.setattr(time, "time", clock)
    for source in home.glob("*.safetensors"):
        os.utime(source, (max(0.0, real() + jump),) * 2)
    works(home, command, Disk(home, system), whole[command])
