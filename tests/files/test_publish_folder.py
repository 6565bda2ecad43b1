"""A folder that replaces another: exchanged at once where the system can, by two renames elsewhere."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptkit.errors import CannotWrite, WouldOverwrite
from adaptkit.files import _exchange as exchanging
from adaptkit.files import publish as module
from adaptkit.files.publish import publish_folder

NAMES = ("a", "b")
ATOMIC = sys.platform in ("linux", "darwin")
# every process is forked before torch is there, and kills itself at the n-th line that publish_folder and what it
# calls in adaptkit.files run: before it, after it, and at the ends of the functions
SERVER = """
import os, signal, sys
from pathlib import Path
from adaptkit.files import publish
path, portable = Path(sys.argv[1]), sys.argv[2] == "portable"
if portable:
    publish.exchange = lambda one, other: False
files = os.path.dirname(publish.__file__)
for step in range(1, 1000):
    child = os.fork()
    if not child:
        count = 0
        def trace(frame, event, argument):
            global count
            if os.path.dirname(frame.f_code.co_filename) != files:
                return None
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        with publish.publish_folder(path, {"a", "b"}, overwrite=True) as made:
            for name in ("a", "b"):
                (made / name).write_text(str(step))
        sys.settrace(None)
        os._exit(0)
    killed = os.waitpid(child, 0)[1]
    print(killed, flush=True)
    if not killed:
        break
    sys.stdin.readline()
"""


@pytest.fixture(params=["atomic", "portable"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways; the portable one is all that Windows and some file systems have."""
    if request.param == "portable":
        monkeypatch.setattr(module, "exchange", lambda one, other: False)
    elif not ATOMIC:
        pytest.skip("no exchange here")
    return str(request.param)


def fill(folder: Path, text: str) -> None:
    for name in NAMES:
        (folder / name).write_text(text)


def held(folder: Path) -> str | None:
    """What `fill` wrote; fails for a mixture or a part."""
    if not folder.exists():
        return None
    assert sorted(item.name for item in folder.iterdir()) == list(NAMES)
    (text,) = {(folder / name).read_text() for name in NAMES}
    return text


def test_a_new_folder_and_its_replacement(tmp_path: Path, way: str) -> None:
    path = tmp_path / "out"
    for text in ("1", "2", "3"):
        with publish_folder(path, set(NAMES), overwrite=True) as made:
            fill(made, text)
        assert held(path) == text
        assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_folder(tmp_path: Path, way: str) -> None:
    path = tmp_path / "out"

    def failing() -> None:
        with publish_folder(path, set(NAMES), overwrite=True) as made:
            fill(made, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert not list(tmp_path.iterdir())
    path.mkdir()
    fill(path, "old")
    with pytest.raises(KeyboardInterrupt):
        failing()
    assert held(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path, way: str) -> None:
    """Somebody else's folder of that name, or another file in the old one."""
    path = tmp_path / "out"

    def meeting(overwrite: bool, strange: str) -> None:
        with publish_folder(path, set(NAMES), overwrite=overwrite) as made:
            fill(made, "new")
            path.mkdir(exist_ok=True)
            (path / strange).write_text("theirs")

    for overwrite, strange in ((False, "a"), (True, "mine")):
        with pytest.raises(WouldOverwrite):
            meeting(overwrite, strange)
        assert (path / strange).read_text() == "theirs"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_a_link_is_replaced_and_not_followed(tmp_path: Path, way: str) -> None:
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    fill(elsewhere, "theirs")
    path.symlink_to(elsewhere)
    with publish_folder(path, set(NAMES), overwrite=True) as made:
        fill(made, "new")
    assert (held(path), path.is_symlink(), held(elsewhere)) == ("new", False, "theirs")
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_system_that_refuses_gets_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file system or a sandbox says no; a C library has no such call."""
    asked = []

    def refuse(one: bytes, other: bytes, flag: int) -> int:
        asked.append(code)
        return -1

    monkeypatch.setattr(exchanging, "_call", lambda: None if code == errno.ENOSYS else refuse)
    path = tmp_path / "out"
    for text in ("1", "2"):
        with publish_folder(path, set(NAMES), overwrite=True) as made:
            fill(made, text)
    assert held(path) == "2"
    # a new name, an exchange, and a new name after it
    assert len(asked) == 3 * (code != errno.ENOSYS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not ATOMIC, reason="no exchange here")
def test_the_exchange(tmp_path: Path) -> None:
    one, other = (
        tmp_path / "one",
        tmp_path / "ö\udcff" if sys.platform == "linux" else tmp_path / "ö",
    )
    for folder in (one, other):
        folder.mkdir()
        fill(folder, folder.name.encode("utf-8", "replace").decode())
    before = held(one), held(other)
    if not exchanging.exchange(one, other):
        pytest.skip("this file system exchanges nothing")
    assert (held(other), held(one)) == before
    assert not exchanging.exchange(one, tmp_path / "missing")
    assert not exchanging.exchange(one, Path("a\0b"))


@pytest.mark.parametrize(
    ("platform", "name", "fixed"),
    [
        ("linux", "renameat2", (-100, b"a", -100, b"b", 2)),
        ("darwin", "renamex_np", (b"a", b"b", 2)),
        ("win32", "", ()),
    ],
)
def test_the_call_of_each_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str, fixed: tuple[object, ...]
) -> None:
    """With a C library that notes what it is asked; and with one that has no such call."""
    asked = []

    def note(*arguments: object) -> int:
        asked.append(arguments)
        return 0

    monkeypatch.setattr(exchanging.sys, "platform", platform)
    call = exchanging._call.__wrapped__
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(**{name: note}))
    found = call()
    assert (found is None) == (platform == "win32")
    if found is not None:
        assert found(b"a", b"b", 2) == 0
        assert asked == [fixed]
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
        assert call() is None


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_no_permission_is_said(tmp_path: Path, way: str) -> None:
    path = tmp_path / "in" / "out"
    path.mkdir(parents=True)
    fill(path, "old")

    def locked_out() -> None:
        with publish_folder(path, set(NAMES), overwrite=True) as made:
            fill(made, "new")
            path.parent.chmod(0o500)

    try:
        with pytest.raises(CannotWrite, match="permission denied"):
            locked_out()
    finally:
        path.parent.chmod(0o700)
    assert held(path) == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("portable", [False, True], ids=["atomic", "portable"])
def test_killed_at_every_line(tmp_path: Path, portable: bool) -> None:
    """Always the old folder or the new one, and never none where the exchange works."""
    path, seen = tmp_path / "out", Counter[str]()
    path.mkdir()
    fill(path, "0")
    (tmp_path / "probe").mkdir()
    atomic = not portable and exchanging.exchange(path, tmp_path / "probe")
    if atomic:
        assert exchanging.exchange(path, tmp_path / "probe")
    (tmp_path / "probe").rmdir()
    arguments = [sys.executable, "-c", SERVER, str(path), "portable" if portable else ""]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        current, step = "0", 1
        while int(server.stdout.readline()):
            found = held(path)
            if found is None:  # between the two renames: the old folder is still there
                (old,) = tmp_path.glob(".out.*.old")
                assert held(old) == current
                old.rename(path)
                seen["none"] += 1
            else:
                assert found in (current, str(step))
                seen["new" if found == str(step) else "old"] += 1
                current = found
            for left in tmp_path.iterdir():
                assert left == path or (
                    left.name.startswith(".out.") and left.suffix in (".part", ".old")
                ), left
            step += 1
            server.stdin.write("\n")
            server.stdin.flush()
        assert held(path) == str(step)
    assert server.returncode == 0
    assert seen["old"] > 20
    assert seen["new"] > 5
    assert (seen["none"] == 0) if atomic else (seen["none"] > 0), seen
