"""Hidden files of dead runs go, those of live ones stay; two writers never lose a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adaptkit.cli import cli
from adaptkit.errors import WouldOverwrite
from adaptkit.files import _exchange, leftovers, output_file
from adaptkit.files.header import TensorSpec
from adaptkit.files.publish import publish_folder
from adaptkit.files.sink import TensorSink

ONE = [TensorSpec("x", "U8", (4,))]


def write(path: Path, number: int = 1, **options: bool) -> None:
    with TensorSink(path, ONE, **options) as sink:
        sink.put("x", torch.full((4,), number, dtype=torch.uint8))
        sink.commit()


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def part(folder: Path, pid: int, name: str = "out.safetensors", mark: str | None = None) -> Path:
    mark = leftovers._machine() if mark is None else mark
    path = folder / f".{name}.{pid}-{mark}00000000.part"
    path.write_bytes(b"half")
    return path


def test_a_run_removes_what_dead_runs_left_under_its_name(tmp_path: Path) -> None:
    pid = dead_pid()
    gone = [part(tmp_path, pid), part(tmp_path, os.getpid())]
    folder = tmp_path / f".out.safetensors.{pid}-{leftovers._machine()}00000001.part"
    folder.mkdir()
    (folder / "x").touch()
    kept = [
        part(tmp_path, pid, "other.safetensors"),
        part(tmp_path, os.getppid()),
        part(tmp_path, pid, mark="zzzz"),
        part(tmp_path, pid, mark="0000" if leftovers._machine() != "0000" else "1111"),
    ]
    write(tmp_path / "out.safetensors")
    assert not any(path.exists() for path in (*gone, folder))
    assert all(path.exists() for path in kept)


def test_what_is_being_written_is_never_removed(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with TensorSink(out, ONE) as sink:
        write(out, 2, overwrite=True)
        sink.put("x", torch.ones(4, dtype=torch.uint8))
        assert sum(one.dead for one in leftovers.found(tmp_path)) == 0
        with pytest.raises(WouldOverwrite):
            sink.commit()
    assert out.read_bytes()[-1] == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows locks open files itself")
def test_a_lock_keeps_what_the_process_table_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a writer in another container on this machine."""
    path = part(tmp_path, dead_pid())
    with path.open("rb", buffering=0) as file:
        leftovers.lock(file)
        assert [one.dead for one in leftovers.found(tmp_path)] == [False]
    assert [one.dead for one in leftovers.found(tmp_path)] == [True]


@pytest.mark.parametrize("call", ["system", "none", "no links"])
def test_of_two_writers_one_wins_and_the_other_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call != "system":
        monkeypatch.setattr(_exchange, "_call", lambda: None)
    if call == "no links":

        def refuse(*_: object) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out.safetensors"
    ended: list[object] = []
    ready = threading.Barrier(4)

    def run(number: int) -> None:
        with TensorSink(out, ONE) as sink:
            sink.put("x", torch.full((4,), number, dtype=torch.uint8))
            ready.wait()
            try:
                sink.commit()
                ended.append(number)
            except WouldOverwrite as error:
                ended.append(error)

    several = 4 if call != "no links" else 1  # without either call the check is not atomic
    ready = threading.Barrier(several)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(several)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [one for one in ended if isinstance(one, int)]
    assert out.read_bytes()[-1] == won
    assert [item.name for item in tmp_path.iterdir()] == ["out.safetensors"]
    with pytest.raises(WouldOverwrite):
        write(out)


def test_a_folder_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        with publish_folder(out, {"x"}) as made:
            (made / "x").touch()
            out.mkdir()
            (out / "x").write_text("theirs")

    with pytest.raises(WouldOverwrite):
        fill()
    assert (out / "x").read_text() == "theirs"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_clean_lists_and_removes(tmp_path: Path) -> None:
    dead, live = part(tmp_path, dead_pid()), part(tmp_path, os.getppid(), "live.safetensors")
    found = CliRunner().invoke(cli, ["clean", str(tmp_path), "--dry-run"])
    assert found.stdout.split() == [str(dead)]
    assert dead.exists()
    found = CliRunner().invoke(cli, ["clean", str(tmp_path)])
    assert "1 removed, 4 B, 1 in use" in found.stderr
    assert not dead.exists()
    assert live.exists()


WRITER = """
import sys, time
from adaptkit.cli import main
from adaptkit.files.header import TensorSpec
from adaptkit.files.sink import TensorSink
from adaptkit.cli import cli
import click
@cli.command()
@click.argument("path")
def hold(path):
    with TensorSink(path, [TensorSpec("x", "U8", (4,))]) as sink:
        print("ready", flush=True)
        time.sleep(60)
cli.get_command = lambda context, name: hold
sys.argv = ["adaptkit", "hold", sys.argv[1]]
main()
"""


@contextmanager
def writing(folder: Path, hang_up: str) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of an output, which began with this answer to SIGHUP."""
    begins = f"import signal; signal.signal(signal.SIGHUP, signal.{hang_up})\n"
    arguments = [sys.executable, "-c", begins + WRITER, str(folder / "out.safetensors")]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        yield run


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_cleans_up(tmp_path: Path, name: str, code: int) -> None:
    # under nohup the tests themselves ignore SIGHUP, and a process inherits that
    with writing(tmp_path, "SIG_DFL") as run:
        assert len(list(tmp_path.iterdir())) == 1
        run.send_signal(getattr(signal, name))
        _, told = run.communicate(timeout=30)
    assert run.returncode == code
    assert told.strip() in ("interrupted", "terminated")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_hang_up_is_ignored_under_nohup(tmp_path: Path) -> None:
    with writing(tmp_path, "SIG_IGN") as run:
        run.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=30)
    assert run.returncode == 143


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_during_the_imports(tmp_path: Path) -> None:
    """A module that takes long to import is interrupted: no traceback, exit 130."""
    (tmp_path / "click.py").write_text(
        "import os, time\nos.write(1, b'importing\\n')\ntime.sleep(60)\n"
    )
    home = str(Path(output_file.__file__).parents[2])
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {home!r}]; from adaptkit.__main__ import run; run()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "importing\n"
        time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=30)
    assert (run.returncode, told) == (130, "interrupted\n")
