"""Writing: laws F2 to F4. The file appears whole or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.errors import (
    CannotWrite,
    CorruptFile,
    NoSuchName,
    ShapeMismatch,
    UnreadableFile,
    WouldOverwrite,
)
from adaptkit.files import output_file as module
from adaptkit.files import reader as source_module
from adaptkit.files import sink as sink_module
from adaptkit.files.header import TensorSpec
from adaptkit.files.open import open_source
from adaptkit.files.sink import TensorSink
from adaptkit.files.spool import Spool
from adaptkit.files.tensors import spec_of, tensor_bytes
from tests.files.test_source import DTYPES, raw


@pytest.fixture(params=["pwrite", "portable"])
def way(request, monkeypatch):
    """Both ways of writing and copying; the portable one is all that Windows has."""
    if request.param == "portable":
        for flag, call in (
            ("HAS_PWRITE", "pwrite"),
            ("HAS_PREADV", "preadv"),
            ("HAS_COPY_FILE_RANGE", "copy_file_range"),
        ):
            for home in (module, source_module):
                monkeypatch.setattr(home, flag, False, raising=False)
            monkeypatch.delattr(os, call, raising=False)
    elif not module.HAS_PWRITE:
        pytest.skip("no pwrite here")


def specs_of(state):
    return [spec_of(name, tensor) for name, tensor in state.items()]


def example():
    state = {"ü": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    for dtype in DTYPES:
        state[f"x.{dtype}"] = torch.randint(0, 2, (3, 5)).to(dtype)
    return state


def write(path, state, metadata=None, **options):
    with TensorSink(path, specs_of(state), metadata, **options) as sink:
        for name, tensor in state.items():
            sink.put(name, tensor)
        sink.commit()
    return path


def equal(found, wanted):
    return (found.dtype, found.shape, raw(found)) == (wanted.dtype, wanted.shape, raw(wanted))


def leftovers(folder):
    return [item.name for item in folder.iterdir() if item.name.endswith(".part")]


def test_the_library_reads_what_we_write(tmp_path, way):
    state, path = example(), tmp_path / "mit Leerzeichen 名.safetensors"
    write(path, state, {"k": "ü", "a": "b"})
    with safe_open(path, "pt") as official:
        assert official.metadata() == {"k": "ü", "a": "b"}
        assert set(official.keys()) == set(state)
        assert all(equal(official.get_tensor(name), tensor) for name, tensor in state.items())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_same_input_same_bytes_in_any_order(tmp_path, way):
    state = example()
    first = write(tmp_path / "a", state, {"k": "v"}).read_bytes()
    with TensorSink(tmp_path / "b", specs_of(state), {"k": "v"}) as sink:
        for name in reversed(state):
            sink.put(name, state[name])
        sink.commit()
    assert (tmp_path / "b").read_bytes() == first


def test_no_tensors_at_all(tmp_path):
    assert load_file(write(tmp_path / "a.safetensors", {})) == {}


def test_threads_write_together_in_pieces(tmp_path, way, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 300)
    state = {f"t{i}": torch.full((997,), i, dtype=torch.int16) for i in range(100)}
    with (
        TensorSink(tmp_path / "a.safetensors", specs_of(state)) as sink,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda item: sink.put(*item), state.items()))
        sink.commit()
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_any_layout_of_a_tensor(tmp_path):
    base = torch.arange(24.0)
    state = {
        "transposed": base.reshape(4, 6).t(),
        "step": base[::5],
        "expanded": base[:1].expand(4),
        "odd stride": base[::2][:1],
        "grad": base.clone().requires_grad_(),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    }
    found = load_file(write(tmp_path / "a.safetensors", state))
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.detach().resolve_conj().resolve_neg()), name


def test_checks(tmp_path):
    sink = TensorSink(tmp_path / "a", [TensorSpec("x", "F32", (2,)), TensorSpec("y", "F16", ())])
    with pytest.raises(ShapeMismatch, match=r"expected F32 \[2\], got F32 \[3\]"):
        sink.put("x", torch.ones(3))
    with pytest.raises(ShapeMismatch, match="F16"):
        sink.put("x", torch.ones(2).half())
    with pytest.raises(ShapeMismatch):
        sink.put("x", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ShapeMismatch):
        sink.put_bytes("x", memoryview(b"123"))
    with pytest.raises(NoSuchName):
        sink.put("z", torch.ones(2))
    sink.put("x", torch.ones(2))
    with pytest.raises(RuntimeError, match="twice"):
        sink.put("x", torch.ones(2))
    with pytest.raises(RuntimeError, match="1 tensors were never written"):
        sink.commit()
    with pytest.raises(RuntimeError, match="closed"):
        sink.put("y", torch.tensor(1.0).half())
    assert list(tmp_path.iterdir()) == []


# --- copying ---------------------------------------------------------------------------------------------------------


def source_file(folder):
    torch.manual_seed(0)
    state = {
        f"m{i:02}": torch.randn(40 + i).to([torch.float32, torch.bfloat16][i % 2])
        for i in range(30)
    }
    save_file(state, folder / "in.safetensors", {"k": "v"})
    return folder / "in.safetensors", state


def test_copy_many_is_exact_and_joins_neighbours(tmp_path, way, monkeypatch):
    monkeypatch.setattr(module, "_COPY_BUFFER", 100)
    path, state = source_file(tmp_path)
    pieces = []
    copy_file = TensorSink._copy_file

    def seen(self, path, runs):
        pieces.extend(runs)
        copy_file(self, path, runs)

    monkeypatch.setattr(TensorSink, "_copy_file", seen)
    with open_source(path) as source:
        with TensorSink(tmp_path / "out", source.infos.values(), source.metadata) as sink:
            sink.copy_many((name, source, name) for name in source.infos)
            sink.commit()
        assert (tmp_path / "out").read_bytes() == path.read_bytes()
        assert [piece.length for piece in pieces] == [
            sum(info.nbytes for info in source.infos.values())
        ]
        renamed = [
            TensorSpec("new." + name, info.dtype, info.shape)
            for name, info in sorted(source.infos.items())
        ]
        with TensorSink(tmp_path / "renamed", renamed) as sink:
            for name in state:
                sink.copy("new." + name, source, name)
            sink.commit()
    found = load_file(tmp_path / "renamed")
    assert all(equal(found["new." + name], tensor) for name, tensor in state.items())


@pytest.fixture
def two(monkeypatch):
    """Copying by two threads, however little there is; the helper's name tells them apart."""
    monkeypatch.setattr(module, "_MUCH", 0)
    monkeypatch.setattr(module, "_COPY_BUFFER", 50)
    monkeypatch.setattr(module, "HAS_COPY_FILE_RANGE", False)


def shuffled(source):
    """Specs in an order in which no two neighbours of the source are neighbours."""
    infos = list(source.infos.values())
    return [TensorSpec(info.name, info.dtype, info.shape) for info in (*infos[::2], *infos[1::2])]


def test_two_threads_copy_what_one_would(tmp_path, way, two, monkeypatch):
    path, state = source_file(tmp_path)
    threads = set()
    read_at = module._read_at

    def seen(*args):
        threads.add(threading.get_ident())
        return read_at(*args)

    monkeypatch.setattr(module, "_read_at", seen)
    with open_source(path) as source, TensorSink(tmp_path / "out", shuffled(source)) as sink:
        sink.copy_many((name, source, name) for name in source.infos)
        for name, info in source.infos.items():
            assert sink.read(name) == source.raw(name), info
        sink.commit()
    assert len(threads) == 2
    found = load_file(tmp_path / "out")
    assert all(equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("where", ["helper", "main"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_a_fault_in_either_thread_stops_both(tmp_path, two, monkeypatch, where, error):
    path, _ = source_file(tmp_path)
    read_at, main = module._read_at, threading.get_ident()

    def faulty(*args):
        if (threading.get_ident() == main) == (where == "main"):
            raise error
        time.sleep(0.001)
        return read_at(*args)

    monkeypatch.setattr(module, "_read_at", faulty)
    before = threading.active_count()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UnreadableFile

    def copied():
        with open_source(path) as source, TensorSink(tmp_path / "out", shuffled(source)) as sink:
            sink.copy_many((name, source, name) for name in source.infos)
            sink.commit()

    with pytest.raises(expected):
        copied()
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "out").exists()
    assert threading.active_count() == before


def test_copy_of_shards_views_and_packed_bits(tmp_path, way):
    (tmp_path / "in").mkdir()
    first = {"t": torch.arange(6.0).reshape(2, 3).t(), "e": torch.zeros(0)}
    torch.save(first, tmp_path / "in" / "model-00001-of-00002.bin")
    torch.save({"u": torch.arange(5)}, tmp_path / "in" / "model-00002-of-00002.bin")
    with (
        open_source(tmp_path / "in") as source,
        TensorSink(tmp_path / "out", source.infos.values()) as sink,
    ):
        sink.copy_many((name, source, name) for name in source.infos)
        sink.commit()
    found = load_file(tmp_path / "out")
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["u"].tolist() == [0, 1, 2, 3, 4]
    four = TensorSpec("f", "F4", (2, 4))
    with TensorSink(tmp_path / "f4", [four]) as sink:
        sink.put_bytes("f", memoryview(b"abcd"))
        sink.commit()
    with open_source(tmp_path / "f4") as source, TensorSink(tmp_path / "f4b", [four]) as sink:
        sink.copy("f", source)
        sink.commit()
    assert (tmp_path / "f4").read_bytes() == (tmp_path / "f4b").read_bytes()


def test_neighbours_by_number_in_two_files_are_not_joined(tmp_path, way):
    folder = tmp_path / "in"
    folder.mkdir()
    write(
        folder / "model-00001-of-00002.safetensors", {"a": torch.full((200,), 1, dtype=torch.uint8)}
    )
    end = (folder / "model-00001-of-00002.safetensors").stat().st_size
    state = {
        "b": torch.full((100,), 2, dtype=torch.uint8),
        "c": torch.full((9,), 3, dtype=torch.uint8),
    }
    start = len(sink_module.build_header(specs_of(state))[0])
    state["b"] = torch.full((end - start,), 2, dtype=torch.uint8)
    write(folder / "model-00002-of-00002.safetensors", state)
    with (
        open_source(folder) as source,
        TensorSink(tmp_path / "out", [source.infos["a"], source.infos["c"]]) as sink,
    ):
        assert source.span("a")[2] == source.span("c")[1]
        sink.copy_many([("a", source, "a"), ("c", source, "c")])
        sink.commit()
    assert load_file(tmp_path / "out")["c"].tolist() == [3] * 9


def test_copy_checks(tmp_path, way):
    path, _ = source_file(tmp_path)
    with (
        open_source(path) as source,
        TensorSink(tmp_path / "out", [TensorSpec("m00", "F32", (41,))]) as sink,
    ):
        with pytest.raises(ShapeMismatch):
            sink.copy("m00", source)
        with pytest.raises(NoSuchName):
            sink.copy("m00", source, "m99")
    with open_source(path) as source, TensorSink(tmp_path / "out", source.infos.values()) as sink:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(CorruptFile, match="truncated"):
            sink.copy_many((name, source, name) for name in source.infos)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not module.HAS_COPY_FILE_RANGE, reason="no copy_file_range here")
@pytest.mark.parametrize("shift", [0, 8, 4096])
def test_the_kernel_copies_where_whole_blocks_may_be_shared(tmp_path, monkeypatch, shift):
    path, state = source_file(tmp_path)
    with open_source(path) as source:
        head = min(info.start for info in source.infos.values())
    metadata, real, calls = {"k": "v"}, os.copy_file_range, []
    while shift and len(sink_module.build_header(specs_of(state), metadata)[0]) < head + shift:
        metadata["k"] += "v"
    monkeypatch.setattr(os, "copy_file_range", lambda *args: calls.append(args) or real(*args))
    with (
        open_source(path) as source,
        TensorSink(tmp_path / "out", source.infos.values(), metadata) as sink,
    ):
        assert min(info.start for info in sink.infos.values()) == head + shift
        sink.copy_many((name, source, name) for name in source.infos)
        sink.commit()
    assert bool(calls) == (shift % 4096 == 0)
    found = load_file(tmp_path / "out")
    assert all(equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.skipif(not module.HAS_COPY_FILE_RANGE, reason="no copy_file_range here")
@pytest.mark.parametrize("fault", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, None])
def test_copy_falls_back_when_the_kernel_will_not(tmp_path, monkeypatch, fault):
    path, _ = source_file(tmp_path)
    real, calls = os.copy_file_range, []

    def stubborn(source, target, count, at, to):
        calls.append(count)
        if len(calls) > 1:
            if fault is None:
                return 0
            raise OSError(fault, os.strerror(fault))
        return real(source, target, min(count, 50), at, to)

    monkeypatch.setattr(os, "copy_file_range", stubborn)
    with (
        open_source(path) as source,
        TensorSink(tmp_path / "out", source.infos.values(), source.metadata) as sink,
    ):
        sink.copy_many((name, source, name) for name in source.infos)
        sink.commit()
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert len(calls) == 2


# --- F3: whatever happens, the old file or the new one ---------------------------------------------------------------


class Stop(BaseException):
    pass


CALLS = ["pwrite", "fsync", "replace", "copy_file_range", "preadv"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, OSError(errno.EIO, "I/O error")])
def test_stopped_at_any_call_leaves_the_old_state(tmp_path, monkeypatch, old, error):
    """Inject the fault at the 1st, 2nd, 3rd … of the system calls that a write makes, until one run comes through."""
    path, _ = source_file(tmp_path)
    out = tmp_path / "out.safetensors"
    if old:
        out.write_bytes(b"old")
    state = {"countdown": 0}

    def faulty(call):
        def wrapped(*args, **kwargs):
            state["countdown"] -= 1
            if state["countdown"] == 0:
                raise error
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        if hasattr(os, name):
            monkeypatch.setattr(os, name, faulty(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", faulty(Path.replace))
    monkeypatch.setattr(Path, "open", faulty(Path.open))
    for step in range(1, 60):
        state["countdown"] = -1
        with open_source(path) as source:
            names = list(source.infos)
            state["countdown"] = step
            try:
                with TensorSink(out, source.infos.values(), overwrite=old) as sink:
                    sink.put(names[0], source.read(names[0]))
                    sink.copy_many((name, source, name) for name in names[1:])
                    sink.commit()
            except (KeyboardInterrupt, Stop, CannotWrite, UnreadableFile):
                pass
        assert leftovers(tmp_path) == []
        if state["countdown"] > 0:
            break
        if (
            out.exists() and out.read_bytes() != b"old"
        ):  # only the sync after the rename may still fail
            assert len(load_file(out)) == len(names)
            out.write_bytes(b"old") if old else out.unlink()
        else:
            assert out.exists() == old
    assert step > 5
    assert len(load_file(out)) == len(names)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("old", [False, True])
def test_killed_in_mid_write(tmp_path, old):
    out = tmp_path / "out.safetensors"
    if old:
        out.write_bytes(b"old")
    code = (
        "import sys, time; from adaptkit.files.sink import TensorSink; from adaptkit.files.header import TensorSpec\n"
        "s = TensorSink(sys.argv[1], [TensorSpec('a', 'U8', (9,)), TensorSpec('b', 'U8', (9,))], overwrite=True)\n"
        "s.put_bytes('a', memoryview(bytes(9))); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert len(leftovers(tmp_path)) == 1
    assert leftovers(tmp_path)[0].startswith(".out.safetensors.")
    assert out.exists() == old
    assert not old or out.read_bytes() == b"old"


def test_leaving_without_commit_leaves_nothing(tmp_path):
    state = example()
    with TensorSink(tmp_path / "a", specs_of(state)) as sink:
        assert len(leftovers(tmp_path)) == 1
        for name, tensor in state.items():
            sink.put(name, tensor)
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_abort_waits_for_writers(tmp_path, monkeypatch):
    started, ended, some = threading.Event(), [], TensorSink._some

    def slow(self, file, data, at):
        started.set()
        time.sleep(0.1)
        written = some(self, file, data, at)
        ended.append(at)
        return written

    with TensorSink(tmp_path / "a", [TensorSpec("x", "F32", (2,))]) as sink:
        monkeypatch.setattr(TensorSink, "_some", slow)
        thread = threading.Thread(target=sink.put, args=("x", torch.ones(2)))
        thread.start()
        started.wait()
    assert len(ended) == 1
    thread.join()
    assert list(tmp_path.iterdir()) == []


# --- F4 and refusals -------------------------------------------------------------------------------------------------


def test_output_may_be_the_input(tmp_path, way):
    path, state = source_file(tmp_path)
    source = open_source(path)
    with TensorSink(path, source.infos.values(), {"new": "yes"}, overwrite=True) as sink:
        for name, info in source.infos.items():
            if info.dtype == "F32":
                sink.put(name, source.read(name) * 2)
        sink.copy_many(
            (name, source, name) for name, info in source.infos.items() if info.dtype != "F32"
        )
        source.close()
        sink.commit()
    found = load_file(path)
    for name, tensor in state.items():
        assert equal(found[name], tensor * 2 if tensor.dtype == torch.float32 else tensor)


def test_existing_output(tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(WouldOverwrite) as caught:
        TensorSink(out, [])
    assert "--overwrite" in caught.value.hint
    out.unlink()
    sink = TensorSink(out, [])
    out.write_bytes(b"appeared meanwhile")
    with pytest.raises(WouldOverwrite):
        sink.commit()
    assert out.read_bytes() == b"appeared meanwhile"
    assert leftovers(tmp_path) == []
    write(out, {"x": torch.ones(1)}, overwrite=True)
    assert load_file(out)["x"].tolist() == [1]


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "a", "no folder"),
        (tmp_path / "file" / "a", "no folder"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(CannotWrite, match=reason):
            TensorSink(path, [], overwrite=True)
    if os.name == "posix":
        with pytest.raises(CannotWrite, match="device"):
            TensorSink("/dev/null", [], overwrite=True)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.ENOSPC, r"disk is full: 65 bytes are needed"),
     (errno.EIO, "cannot be written")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["open", "_some", "rename_new"])
def test_faults_of_the_disk(tmp_path, monkeypatch, fault, reason, call):
    def faulty(*args, **kwargs):
        raise OSError(fault, os.strerror(fault))

    places = {"_some": TensorSink, "rename_new": module, "open": Path}
    monkeypatch.setattr(places[call], call, faulty)
    with pytest.raises(CannotWrite, match=reason) as caught:
        write(tmp_path / "a", {"x": torch.tensor(1, dtype=torch.uint8)})
    assert caught.value.file == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_cannot_be_committed(tmp_path, monkeypatch):
    with TensorSink(tmp_path / "a", [TensorSpec("x", "U8", ())]) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(TensorSink, "_some", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sink.put("x", torch.tensor(1, dtype=torch.uint8))
        with pytest.raises(RuntimeError, match="never written"):
            sink.commit()
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CannotWrite, match=r"4\d\d\d bytes are needed, 1000 are free"):
        TensorSink(tmp_path / "a", [TensorSpec("x", "F32", (1000,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_mode_honours_umask_and_links_are_replaced(tmp_path):
    before = os.umask(0o027)
    try:
        path = write(tmp_path / "a", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (tmp_path / "blob").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    write(tmp_path / "link", {}, overwrite=True)
    assert (tmp_path / "blob").read_bytes() == b"precious"


def test_long_names(tmp_path):
    write(tmp_path / ("名" * 80 + ".safetensors")[:84], {"x": torch.ones(1)})
    assert leftovers(tmp_path) == []


# --- spool -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_spool(tmp_path, limit):
    state = example()
    with Spool(limit, tmp_path / "out") as spool:
        for name, tensor in state.items():
            spool.append(name, tensor)
        assert spool.specs() == specs_of(state)
        assert bool(getattr(spool._file, "_rolled")) == (limit < 1000)  # noqa: B009
        with pytest.raises(RuntimeError):
            spool.append("ü", torch.ones(1))
        with TensorSink(tmp_path / "a", spool.specs()) as sink:
            spool.write_to(sink)
            sink.commit()
    found = load_file(tmp_path / "a")
    assert all(equal(found[name], tensor) for name, tensor in state.items())
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_spool_faults(tmp_path):
    with (
        Spool(0, tmp_path / "none" / "out") as spool,
        pytest.raises(CannotWrite, match="no folder"),
    ):
        spool.append("x", torch.ones(1))
    with Spool(0, tmp_path / "out") as spool:
        spool.append("x", torch.ones(4))
        spool._file.truncate(3)
        with (
            TensorSink(tmp_path / "a", spool.specs()) as sink,
            pytest.raises(CorruptFile, match="truncated"),
        ):
            spool.write_to(sink)


def test_bytes_of_a_tensor_are_not_copied(tmp_path):
    tensor = torch.zeros(4)
    view = tensor_bytes(tensor)
    tensor[0] = 1
    assert bytes(view[:4]) == b"\0\0\x80\x3f"


def test_a_tensor_in_pieces(tmp_path, way):
    tensor = torch.randn(7, 4, 3).half()
    with TensorSink(
        tmp_path / "a", [TensorSpec("x", "F16", (7, 4, 3)), TensorSpec("y", "F32", (1,))]
    ) as sink:
        with pytest.raises(ShapeMismatch, match=r"expected F16 \[7, 4, 3\], got BF16"):
            sink.pieces("x", torch.bfloat16, (7, 4, 3))
        pieces = sink.pieces("x", torch.float16, (7, 4, 3))
        with pytest.raises(RuntimeError, match="twice"):
            sink.put("x", tensor)
        pieces.put(tensor[5:], 60)
        with pytest.raises(RuntimeError, match="bytes at 144 exceed"):
            pieces.put(tensor[:2], 72)
        with pytest.raises(RuntimeError, match="120 bytes of 'x' were not written"):
            pieces.close()
        sink.put("y", torch.ones(1))
        with pytest.raises(RuntimeError, match="never written"):
            TensorSink.commit(sink)
    with TensorSink(tmp_path / "a", [TensorSpec("x", "F16", (7, 4, 3))]) as sink:
        pieces = sink.pieces("x", torch.float16, (7, 4, 3))
        for first, last in ((5, 7), (0, 2), (2, 5)):
            pieces.put(tensor[first:last], 12 * first)
        pieces.close()
        sink.commit()
    assert equal(load_file(tmp_path / "a")["x"], tensor)


@pytest.mark.parametrize("advice", [True, False])
def test_a_large_file_leaves_the_cache_while_it_is_written(tmp_path, monkeypatch, advice):
    """Every byte but the last window is sent and later dropped; where a system has no such call nothing happens."""
    if advice and not module.HAS_FADVISE:
        pytest.skip("no posix_fadvise here")
    if not advice:
        monkeypatch.setattr(module, "HAS_FADVISE", False)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(module, "_LARGE", 1 << 20)
    monkeypatch.setattr(module, "_WINDOW", 1 << 16)
    told = []
    if advice:
        monkeypatch.setattr(
            os, "posix_fadvise", lambda file, at, length, kind: told.append((at, length))
        )
    state = {str(n): torch.randn(1 << 14) for n in range(20)}
    source = write(tmp_path / "source", state)
    twice = {span for span in told if told.count(span) == 2}
    assert sum(length for _, length in twice) >= (18 << 16 if advice else 0)
    told.clear()
    with open_source(source) as opened, TensorSink(tmp_path / "copy", specs_of(state)) as sink:
        sink.copy_many([(name, opened, name) for name in state])
        sink.commit()
    assert bool(told) == advice
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
