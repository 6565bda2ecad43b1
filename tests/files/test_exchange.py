"""A folder replaced by another: in one step where the system can, by two renames elsewhere."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from adaptkit.files import _exchange
from adaptkit.files.sink import publish_folder

CAN = sys.platform in ("linux", "darwin")


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


@pytest.mark.skipif(not CAN, reason="only Linux and macOS exchange folders")
def test_two_folders_change_places(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "eins ü", "1"), folder(tmp_path / "zwei", "2")
    assert _exchange.exchange(one, two)
    assert (one / "a").read_text() == "2"
    assert (two / "a").read_text() == "1"


def test_what_is_missing_is_not_exchanged(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "1")
    assert not _exchange.exchange(one, tmp_path / "none")
    assert (one / "a").read_text() == "1"


@pytest.mark.parametrize("way", ["exchange", "renames", "no such call"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "renames":
        monkeypatch.setattr(_exchange, "exchange", lambda one, two: False)
    if way == "no such call":
        monkeypatch.setattr(_exchange, "_system_call", lambda: None)
    path = folder(tmp_path / "out", "old")
    with publish_folder(path, {"a"}, overwrite=True) as made:
        (made / "a").write_text("new")
        assert (path / "a").read_text() == "old"
    assert (path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError), publish_folder(path, {"a"}, overwrite=True) as made:
        (made / "a").write_text(str(1 // 0))
    assert (path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not CAN, reason="only Linux and macOS exchange folders")
def test_at_no_moment_is_it_missing(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "0")
    over, missed = threading.Event(), []

    def watch() -> None:
        while not over.is_set():
            if not path.exists():
                missed.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in range(300):
        with publish_folder(path, {"a"}, overwrite=True) as made:
            (made / "a").write_text(str(n))
    over.set()
    watcher.join()
    assert not missed
